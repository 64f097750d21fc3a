"""Which files are added, under which ids, and how far they are."""

from __future__ import annotations

import errno
import io
import os
import re
from datetime import datetime
from pathlib import Path

import pytest
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tollgate.corpus.v1 import corpus_pb2 as pb

from cli.add import Lines
from cli.command import Misused
from cli.intake import Added, document_id, files_of, names_apart, percent_of
from cli.terminal import Terminal


def test_a_folder_stands_for_the_files_in_it_but_not_for_hidden_ones(tmp_path: Path) -> None:
    """Folders are walked, in order; what begins with a dot is left alone; nothing comes twice."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.md", "b/a.pdf", ".hidden", ".git/config"):
        (tmp_path / name).write_text("x")
    found = files_of([tmp_path, tmp_path / "z.md"])
    assert [str(file.path.relative_to(tmp_path)) for file in found] == ["b/a.pdf", "z.md"]
    assert not any(file.reason for file in found)


def test_what_cannot_be_read_is_named_with_why_and_nothing_hangs(tmp_path: Path) -> None:
    """Broken links, loops, pipes and links to folders are told of; good files go on."""
    (tmp_path / "good.md").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "broken.md").symlink_to(tmp_path / "nowhere.md")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "folder")
    (tmp_path / "loop.md").symlink_to(tmp_path / "loop.md")
    os.mkfifo(tmp_path / "pipe.md")
    found = {file.name: file for file in files_of([tmp_path])}
    assert {name: file.why for name, file in found.items()} == {
        "good.md": ("", ""),
        "broken.md": ("FILE_UNREADABLE", "it is a link to something that is not there"),
        "elsewhere": ("FILE_UNREADABLE", "it is a link to a folder, which is not followed"),
        "loop.md": ("FILE_UNREADABLE", os.strerror(errno.ELOOP)),
        "pipe.md": ("FILE_UNREADABLE", "it is a named pipe"),
    }
    assert found["pipe.md"].has_failed
    assert files_of([tmp_path / "pipe.md"])[0].why == found["pipe.md"].why


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_what_may_not_be_read_is_named_with_why(tmp_path: Path) -> None:
    """A file and a folder without permission are told of."""
    (tmp_path / "secret.md").write_text("x")
    (tmp_path / "vault").mkdir()
    for name in ("secret.md", "vault"):
        (tmp_path / name).chmod(0)
    denied = ("FILE_UNREADABLE", os.strerror(errno.EACCES))
    try:
        assert {file.name: file.why for file in files_of([tmp_path])} == {
            "secret.md": denied,
            "vault": denied,
        }
    finally:
        (tmp_path / "vault").chmod(0o700)


def test_files_of_one_name_are_told_apart_by_the_shortest_path_that_does() -> None:
    """A name of its own stays short; namesakes get as many folders as they need."""
    paths = ["/x/a/one/r.md", "/x/b/one/r.md", "/x/b/two/r.md", "/x/s.md", "/x/s.md.bak"]
    assert names_apart([Path(path) for path in paths]) == [
        "a/one/r.md", "b/one/r.md", "two/r.md", "s.md", "s.md.bak",
    ]  # fmt: skip
    assert names_apart([Path("/a/b\n.md")]) == ["b?.md"]


def test_a_stage_says_what_is_simulated_and_what_is_waited_for() -> None:
    """A ready document of a mock is marked as such; a stage that waits has its reason."""
    ready = pb.Document(
        state=pb.DOCUMENT_STATE_READY,
        progress=pb.DocumentProgress(pages_total=3, chunks_total=3),
    )
    file = Added(Path("a.md"), "a", document=ready)
    assert file.stage == "ready: 3 pages, 3 chunks"
    for of in (ready.parsed_by, ready.embedded_by):
        of.simulated = True
        assert file.stage == "ready (simulated): 3 pages, 3 chunks"
        of.simulated = False
    file.document = pb.Document(state=pb.DOCUMENT_STATE_EMBEDDING, reason="BACKEND_UNAVAILABLE")
    assert file.stage == "embedding: BACKEND_UNAVAILABLE"


def test_off_a_terminal_every_stage_and_wait_is_one_line() -> None:
    """A change of stage, of reason or of the time to wait is told once; progress is not."""
    said = io.StringIO()
    lines = Lines(Terminal(console=Console(file=said, width=40)))
    file = Added(Path("a.md"), "a")
    until = int(datetime(2026, 1, 31, 12).timestamp())
    for document in (
        pb.Document(state=pb.DOCUMENT_STATE_PARSING),
        pb.Document(state=pb.DOCUMENT_STATE_PARSING, progress=pb.DocumentProgress(pages_done=1)),
        pb.Document(state=pb.DOCUMENT_STATE_EMBEDDING, reason="NO_BACKEND", message="none serves"),
        pb.Document(
            state=pb.DOCUMENT_STATE_DEFERRED,
            reason="LIMIT_EXCEEDED",
            message="[day] is used up",
            retry_time=Timestamp(seconds=until),
        ),
    ):
        file.now(document)
        lines.changed(file)
        lines.changed(file)
    assert said.getvalue().splitlines() == [
        "a.md: parsing",
        "a.md: embedding: NO_BACKEND; none serves",
        "a.md: deferred: LIMIT_EXCEEDED; [day] is used up; tried again at 2026-01-31 12:00:00",
    ]


def test_a_missing_file_and_an_empty_folder_are_a_wrong_use(tmp_path: Path) -> None:
    """Both are said before anything is sent."""
    with pytest.raises(Misused, match="no file"):
        files_of([tmp_path / "nowhere.pdf"])
    with pytest.raises(Misused, match="no files in"):
        files_of([tmp_path])


@given(st.text(min_size=1).filter(lambda name: "/" not in name and "\0" not in name))
def test_any_file_name_gives_an_id_that_the_mesh_takes(name: str) -> None:
    """Ids are 1 to 128 letters, digits, dots, underscores and hyphens, whatever the name."""
    assert re.fullmatch(r"[A-Za-z0-9._-]{1,128}", document_id(Path("/somewhere") / name))


def test_the_same_file_has_the_same_id_and_its_namesake_another(tmp_path: Path) -> None:
    """The id is the file's place, so that a second adding is a revision and not a copy."""
    assert document_id(tmp_path / "a.md") == document_id(tmp_path / "x" / ".." / "a.md")
    assert document_id(tmp_path / "a.md") != document_id(tmp_path / "x" / "a.md")
    assert document_id(tmp_path / "a.md").startswith("a.md-")


def test_progress_never_goes_back_and_ends_at_a_hundred() -> None:
    """Stages follow one another on the bar, and a repeated stage does not move it back."""
    stages = [
        pb.Document(state=pb.DOCUMENT_STATE_STORED),
        pb.Document(
            state=pb.DOCUMENT_STATE_PARSING,
            progress=pb.DocumentProgress(pages_done=3, pages_total=4),
        ),
        pb.Document(state=pb.DOCUMENT_STATE_CHUNKING),
        pb.Document(
            state=pb.DOCUMENT_STATE_EMBEDDING,
            progress=pb.DocumentProgress(chunks_done=5, chunks_total=9),
        ),
        pb.Document(state=pb.DOCUMENT_STATE_INDEXING),
        pb.Document(state=pb.DOCUMENT_STATE_READY),
    ]
    percents = [percent_of(document) for document in stages]
    assert percents == sorted(set(percents))
    assert percents[-1] == 100
    file = Added(Path("a"), "a")
    file.now(stages[3])
    file.now(stages[1])
    assert file.percent == percents[3]
