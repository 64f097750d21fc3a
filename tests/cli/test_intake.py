"""Which files are added, under which ids, and how far they are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tollgate.corpus.v1 import corpus_pb2 as pb

from cli.command import Misused
from cli.intake import Added, document_id, files_of, percent_of


def test_a_folder_stands_for_the_files_in_it_but_not_for_hidden_ones(tmp_path: Path) -> None:
    """Folders are walked, in order; what begins with a dot is left alone; nothing comes twice."""
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("z.md", "b/a.pdf", ".hidden", ".git/config"):
        (tmp_path / name).write_text("x")
    found = files_of([tmp_path, tmp_path / "z.md"])
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/a.pdf", "z.md"]


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
