"""`tollgate demo`: everything once, right on every run, and stopped after."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from tollgate.corpus.v1 import corpus_pb2
from tollgate.cost.v1 import cost_pb2

from chassis.settings import load_mesh
from cli.command import Session
from cli.demo.demo import PRICES, Question, Show, question_of, summed
from cli.intake import files_of
from cli.terminal import Terminal
from tests.running import Up, environment_of, tollgate

pytestmark = pytest.mark.timeout(180)

ROOMS = {"router", "cost", "parser", "embedder", "storage", "corpus"}


@pytest.fixture(scope="module")
def state_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state directory, so that the second demo finds what the first left."""
    return tmp_path_factory.mktemp("demo")


def _bill(told: dict[str, Any]) -> list[tuple[str, str, str]]:
    return sorted(
        (h["operation"], h["held_nanos_usd"], h["charged_nanos_usd"])
        for h in told["holds"]
        # Which of several documents makes the bucket and the space is a matter of luck.
        if not h["operation"].endswith(("CreateBucket", "EnsureSpace"))
    )


def test_the_demo_is_right_on_its_first_and_on_its_second_run(state_dir: Path) -> None:
    """Documents ready, pages found, holds settled and charged, one whole trace: twice the same."""
    told = []
    for _ in range(2):
        done = tollgate("demo", "--json", environment=environment_of(state_dir))
        assert done.returncode == 0, (done.stdout, done.stderr)
        told.append(json.loads(done.stdout))
    for one in told:
        assert one["ready"] == 3
        assert [search["found"] for search in one["searches"]] == [True, True]
        assert {hold["state"] for hold in one["holds"]} == {"HOLD_STATE_SETTLED"}
        assert {span["service"] for span in one["trace"]} == ROOMS
        assert len({span["trace_id"] for span in one["trace"]}) == 1
    assert _bill(told[0]) == _bill(told[1])
    # Eight pages at 50 USD a million are 400,000 nano-dollars, and the tokens come on top.
    assert sum(int(hold["charged_nanos_usd"]) for hold in told[0]["holds"]) > 400_000


def test_foreign_documents_are_searched_and_unreadable_ones_named(
    state_dir: Path, tmp_path: Path
) -> None:
    """People's own files: two searches made from them, and why a broken one is not there."""
    (tmp_path / "tea.md").write_text("# How to brew green tea\n\nNever with boiling water.\n")
    (tmp_path / "bees.md").write_text("# Keeping bees in winter\n\nFeed them sugar, not honey.\n")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and then nothing")
    done = tollgate("demo", str(tmp_path), environment=environment_of(state_dir))
    assert done.returncode == 0, (done.stdout, done.stderr)
    for words in (
        "How to brew green tea",
        "Keeping bees in winter",
        "2 ready, 1 failed",
        "broken.pdf",
        "DOCUMENT_UNREADABLE",
        "Everything is stopped again",
    ):
        assert words in done.stdout


async def test_a_refused_search_is_told_and_the_bill_and_the_trace_follow(
    running: Up, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A question that the corpus does not take is one line; nothing after it is lost."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    said = io.StringIO()
    terminal = Terminal(console=Console(file=said, width=160))
    (tmp_path / "a.md").write_text("# Tides\n\nThe sea comes in twice a day.\n")
    questions = [Question("sea " * 4000, "a.md", 1), Question("When is high water?", "a.md", 1)]
    show = Show(Session(load_mesh(), terminal), files_of([tmp_path]), questions)
    await show.all()
    assert show.refused == 1
    # What the other finds is not the point: other tests' documents are in the mesh as well.
    assert ["refused" in search for search in show.told["searches"]] == [True, False]
    assert "was refused: INVALID_FIELD: " in said.getvalue()
    assert show.told["holds"]
    assert show.told["trace"]


def test_nothing_readable_at_all_is_a_failure(state_dir: Path, tmp_path: Path) -> None:
    """The exit code says that there was nothing to show."""
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7 and then nothing")
    done = tollgate("demo", str(tmp_path), environment=environment_of(state_dir))
    assert done.returncode == 1
    assert "DOCUMENT_UNREADABLE" in done.stdout
    assert "none of the documents" in done.stderr


def test_the_rate_card_says_what_the_demo_says_of_it() -> None:
    """$50 a million pages and $0.10 a million tokens, as printed."""
    prices = {
        p["unit"]: p["nanos_usd_per_million"] for p in json.loads(PRICES.read_text())["prices"]
    }
    assert prices == {"pages": 50 * 10**9, "tokens": 10**9 // 10}


def test_a_question_is_the_heading_of_a_passage_or_how_it_begins() -> None:
    """Headings of one word and texts of none tell too little to ask for."""
    hit = corpus_pb2.SearchHit
    assert question_of(hit(headings=["A", "Keeping bees"], text="x")) == "Keeping bees"
    assert question_of(hit(headings=["Bees"], text="# Bees\nFeed them sugar. Not honey.")) == (
        "Bees Feed them sugar"
    )
    assert question_of(hit(text="| 1 |")) == ""


@pytest.mark.parametrize("text", ["a" * 9000, "wind " * 2000, "ü" * 9000, "# " + "x " * 5000])
def test_a_question_is_short_however_long_its_passage_goes_on(text: str) -> None:
    """No more than 20 words and 200 characters are asked, of a heading or of a sentence."""
    hit = corpus_pb2.SearchHit
    for asked in (question_of(hit(text=text)), question_of(hit(headings=["A " + text]))):
        assert 12 <= len(asked) <= 200
        assert len(asked.split()) <= 20


def test_a_document_without_sentences_is_shown_to_the_end(state_dir: Path, tmp_path: Path) -> None:
    """A line of 9,000 letters is searched, billed and traced like any other document."""
    (tmp_path / "letters.txt").write_text("a" * 9000)
    done = tollgate("demo", str(tmp_path), "--json", environment=environment_of(state_dir))
    assert done.returncode == 0, (done.stdout, done.stderr)
    told = json.loads(done.stdout)
    assert told["ready"] == 1
    assert told["searches"]
    assert told["holds"]
    assert {span["service"] for span in told["trace"]} == ROOMS


def test_holds_of_one_step_are_summed_without_losing_a_nano_dollar() -> None:
    """Sums keep providers and states apart."""

    def hold(provider: str, charged: int, state: cost_pb2.HoldState.ValueType) -> cost_pb2.Hold:
        made = cost_pb2.Hold(operation="a/Parse", charged_nanos_usd=charged, state=state)
        made.scope.provider = provider
        made.usage.pages = 2
        return made

    settled, released = cost_pb2.HOLD_STATE_SETTLED, cost_pb2.HOLD_STATE_RELEASED
    found = summed(
        [
            hold("x", 1, settled),
            hold("x", 2, settled),
            hold("y", 4, settled),
            hold("x", 0, released),
        ]
    )
    assert [(h.scope.provider, h.charged_nanos_usd, h.usage.pages) for h in found] == [
        ("x", 3, 4),
        ("y", 4, 2),
        ("x", 0, 2),
    ]
