"""Pages become chunks that fit the model and say where they stand."""

from __future__ import annotations

import itertools

import pytest

from chassis.tokens import count_tokens
from services.corpus.chunking import (
    BETWEEN_PAGES,
    SEGMENT_CHARS_MAX,
    Chunk,
    Chunker,
    GivenUpError,
)
from services.corpus.core import ParsedPage
from services.corpus.main import Settings, chunker

SENTENCE = "The warden notes each traveller who passes the bridge and what they carried. "


@pytest.fixture(scope="module")
def cut() -> Chunker:
    return chunker(Settings(chunk_tokens=60, heading_tokens=24))


def chunks_of(cut: Chunker, *markdown: str) -> list[Chunk]:
    return cut.chunks([ParsedPage(number, text) for number, text in enumerate(markdown, 1)])


def test_offsets_name_the_text_in_the_joined_pages(cut: Chunker) -> None:
    """A chunk's text is what its offsets cut out of the pages joined by an empty line."""
    pages = ["# Übersicht\n\n" + SENTENCE * 9, "", "## Zölle 🛂\n\n" + SENTENCE * 7]
    joined = BETWEEN_PAGES.join(pages)
    chunks = chunks_of(cut, *pages)
    assert len(chunks) > 3
    assert all(joined[c.start : c.end] == c.text for c in chunks)
    assert [c.ordinal for c in chunks] == list(range(len(chunks)))
    assert all(a.end <= b.start for a, b in itertools.pairwise(chunks))


def test_no_text_is_lost(cut: Chunker) -> None:
    """Whatever is between two chunks is white space."""
    pages = [
        "# One\n\n" + SENTENCE * 9,
        "```\n# no heading\n```\n\n## Two\n\n* a\n* b\n\n" + SENTENCE,
    ]
    joined = BETWEEN_PAGES.join(pages)
    at = 0
    for chunk in chunks_of(cut, *pages):
        assert not joined[at : chunk.start].strip()
        at = chunk.end
    assert not joined[at:].strip()


def test_page_numbers_are_those_of_the_first_and_last_character(cut: Chunker) -> None:
    """A chunk that runs over a page's end names both pages, by their own numbers."""
    pages = [
        ParsedPage(4, "Short beginning."),
        ParsedPage(7, "And a short end."),
        ParsedPage(9, ""),
    ]
    (chunk,) = cut.chunks(pages)
    assert (chunk.page, chunk.page_end) == (4, 7)


def test_headings_are_the_path_to_the_text(cut: Chunker) -> None:
    """A chunk stands under the headings in force at its own text, the outermost first."""
    text = f"# Tolls\n\n{SENTENCE * 6}\n\n## Rates\n\n{SENTENCE * 6}\n\n# Roads\n\n{SENTENCE * 6}"
    chunks = chunks_of(cut, text)
    paths = [c.headings for c in chunks]
    assert ("Tolls",) in paths
    assert ("Tolls", "Rates") in paths
    assert paths[-1] == ("Roads",)


def test_context_repeats_no_heading_that_the_text_shows(cut: Chunker) -> None:
    """The embedded text has every heading of the path once, and the text last."""
    text = f"# Tolls\n\n## Rates\n\n{SENTENCE * 12}"
    first, *rest = chunks_of(cut, text)
    assert first.text.startswith("# Tolls")
    assert first.embedded_text == first.text
    assert rest
    assert all(c.embedded_text == f"Tolls > Rates\n\n{c.text}" for c in rest)


def test_a_heading_never_stands_alone(cut: Chunker) -> None:
    """A heading that the splitter cut off from its text goes with that text."""
    text = f"# Tolls\n\n## Rates\n\n{SENTENCE * 12}\n\n## Fines\n\n{SENTENCE * 12}"
    assert all("warden" in c.text for c in chunks_of(cut, text))


def test_headings_in_code_are_code(cut: Chunker) -> None:
    """A line in fenced code is no heading, whatever it looks like."""
    text = f"# Real\n\n~~~\n# not one\n```\n# nor this\n~~~\n\n{SENTENCE * 3}"
    assert {h for c in chunks_of(cut, text) for h in c.headings} == {"Real"}


def test_an_unclosed_fence_ends_with_its_page(cut: Chunker) -> None:
    """A page with broken code does not hide the headings of the next."""
    chunks = chunks_of(cut, "```\ncode without an end", f"# Next\n\n{SENTENCE * 6}")
    assert chunks[-1].headings == ("Next",)


def test_chunks_fit_the_model(cut: Chunker) -> None:
    """What is embedded has at most the tokens of chunk, headings and the two special ones."""
    title = "A very long heading about the many obligations of travellers " * 3
    text = f"# {title}\n\n## Rates\n\n{SENTENCE * 40}"
    counts = count_tokens("minilm", [c.embedded_text for c in chunks_of(cut, text)])
    assert max(counts) <= 60 + 24 + 2


def test_a_heading_too_long_for_the_context_is_left_out(cut: Chunker) -> None:
    """The path is shortened from the outermost heading on until it fits."""
    title = "Obligations of travellers and of those who travel with them on foot or otherwise " * 2
    chunks = chunks_of(cut, f"# {title}\n\n## Rates\n\n{SENTENCE * 12}")
    assert chunks[-1].context == "Rates"
    assert chunks[-1].headings == (title.strip(), "Rates")


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "> " * 20_000,
        "\n".join(" " * n + "- x" for n in range(300)),
        "👩‍👩‍👧" * 9_000,
    ],
)
def test_hostile_text_is_cut_whole_and_bounded(cut: Chunker, text: str) -> None:
    """Endless words, quotes, lists and clusters end up in chunks of bounded size, none lost."""
    chunks = chunks_of(cut, text)
    assert max(len(c.text) for c in chunks) <= SEGMENT_CHARS_MAX
    assert "".join("".join(c.text for c in chunks).split()) == "".join(text.split())


def test_chunking_can_be_given_up(cut: Chunker) -> None:
    """A document that nobody waits for is not cut to its end."""
    asked = itertools.count()
    page = ParsedPage(1, SENTENCE * 2_000)
    with pytest.raises(GivenUpError):
        cut.chunks([page], is_given_up=lambda: next(asked) > 1)
    assert next(asked) == 3


@pytest.mark.parametrize("pages", [[], [""], ["\n \n", "\t"]])
def test_no_text_makes_no_chunk(cut: Chunker, pages: list[str]) -> None:
    """Pages without text make no chunks and no error."""
    assert chunks_of(cut, *pages) == []


def test_only_headings_are_still_found(cut: Chunker) -> None:
    """A document of nothing but a title is one chunk."""
    (chunk,) = chunks_of(cut, "# Just a title")
    assert chunk.text == "# Just a title"


def test_the_same_text_under_the_same_headings_has_the_same_hash(cut: Chunker) -> None:
    """The hash is of what is embedded: of the text and its context, not of where it stands."""
    (one,) = chunks_of(cut, "# A\n\nSame.")
    (two,) = chunks_of(cut, "", "# A\n\nSame.")
    (other,) = chunks_of(cut, "# B\n\nSame.")
    assert one.sha256 == two.sha256 != other.sha256
