"""Pages into chunks: pieces of Markdown that an embedding model takes whole, and where they stand.

The splitter cuts at the highest structure that fits (headings, blocks, sentences, words), counting
with the model's own tokenizer. A chunk is embedded with the headings that it stands under, since a
paragraph alone often does not say what it is about.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from services.corpus.core import ParsedPage

BETWEEN_PAGES = "\n\n"
# The splitter's time grows faster than its text where the text is hostile (deep lists, endless
# quotes), so it is given no more than this at once; it is also the most characters of a chunk.
SEGMENT_CHARS_MAX = 16_384
_BREAKS = ("\n# ", "\n## ", "\n### ", "\n\n", "\n", " ")

_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*$")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a document.

    `start` and `end` are offsets in characters into the pages' Markdown joined by an empty line.
    `headings` are those that its first text stands under, the outermost first; `context` names
    the ones that `text` does not show itself.
    """

    ordinal: int
    page: int
    page_end: int
    start: int
    end: int
    headings: tuple[str, ...]
    context: str
    text: str

    @property
    def embedded_text(self) -> str:
        """What is embedded: the context, then the text."""
        return f"{self.context}\n\n{self.text}" if self.context else self.text

    @property
    def sha256(self) -> bytes:
        """The SHA-256 of the embedded text, by which it is known whether it was embedded before."""
        return hashlib.sha256(self.embedded_text.encode()).digest()


class GivenUpError(Exception):
    """Nobody waits for the chunks any more."""


class Splitter(Protocol):
    """Cuts Markdown; answers each piece with its offset in characters."""

    def chunk_indices(self, text: str) -> list[tuple[int, str]]: ...


@dataclass(frozen=True, slots=True)
class _Heading:
    start: int
    end: int
    level: int
    title: str


class Chunker:
    """Cuts documents for one model. Takes a second for some 250 kB, without holding the GIL.

    `heading_tokens_max` is what the headings before a chunk may take beside the splitter's own
    capacity, as `count_tokens` counts.
    """

    def __init__(
        self, splitter: Splitter, count_tokens: Callable[[str], int], heading_tokens_max: int
    ) -> None:
        self._splitter = splitter
        self._count_tokens = count_tokens
        self._heading_tokens_max = heading_tokens_max

    def chunks(
        self, pages: Sequence[ParsedPage], *, is_given_up: Callable[[], bool] = lambda: False
    ) -> list[Chunk]:
        """The chunks of a document whose pages are given in order; none where there is no text.

        Raises GivenUpError soon after nobody waits for them any more.
        """
        text, starts = _joined(pages)
        outline = _Outline(
            [h for page, at in zip(pages, starts, strict=True) for h in _headings(page, at)]
        )
        contexts: dict[tuple[str, ...], str] = {}
        chunks: list[Chunk] = []
        for start, end in self._pieces(text, outline, is_given_up):
            path = outline.path(outline.content_start(text, start, end))
            above = tuple(heading.title for heading in path if heading.start < start)
            if above not in contexts:
                contexts[above] = self._context(above)
            chunks.append(
                Chunk(
                    ordinal=len(chunks),
                    page=pages[bisect_right(starts, start) - 1].number,
                    page_end=pages[bisect_right(starts, end - 1) - 1].number,
                    start=start,
                    end=end,
                    headings=tuple(heading.title for heading in path),
                    context=contexts[above],
                    text=text[start:end],
                )
            )
        return chunks

    def _pieces(
        self, text: str, outline: _Outline, is_given_up: Callable[[], bool]
    ) -> Iterator[tuple[int, int]]:
        """The chunks' bounds. A heading that was cut off from its text goes with that text."""
        lone: tuple[int, int] | None = None
        for start, end in self._cuts(text, is_given_up):
            if lone and not self._is_short(text[lone[0] : start]):
                yield lone
                lone = None
            first = lone[0] if lone else start
            if outline.content_start(text, start, end) == end:
                lone = first, end
            else:
                yield first, end
                lone = None
        if lone:
            yield lone

    def _cuts(self, text: str, is_given_up: Callable[[], bool]) -> Iterator[tuple[int, int]]:
        for first, last in _segments(text):
            if is_given_up():
                raise GivenUpError
            for start, piece in self._splitter.chunk_indices(text[first:last]):
                yield first + start, first + start + len(piece)

    def _is_short(self, text: str) -> bool:
        return self._count_tokens(text) <= self._heading_tokens_max

    def _context(self, titles: tuple[str, ...]) -> str:
        """The path of headings, shortened from the outermost until it fits."""
        for first in range(len(titles)):
            context = " > ".join(titles[first:])
            if self._is_short(context):
                return context
        return ""


class _Outline:
    """A document's headings, for questions by offset."""

    def __init__(self, headings: Sequence[_Heading]) -> None:
        self._headings = headings
        self._starts = [heading.start for heading in headings]
        self._paths: list[tuple[_Heading, ...]] = []
        path: list[_Heading] = []
        for heading in headings:
            while path and path[-1].level >= heading.level:
                path.pop()
            path.append(heading)
            self._paths.append(tuple(path))

    def path(self, at: int) -> tuple[_Heading, ...]:
        """The headings in force at an offset, the outermost first."""
        before = bisect_left(self._starts, at)
        return self._paths[before - 1] if before else ()

    def content_start(self, text: str, start: int, end: int) -> int:
        """Where a piece's own text begins, past the headings it opens with; `end` if nowhere."""
        at = start
        for index in range(bisect_left(self._starts, start), len(self._headings)):
            heading = self._headings[index]
            if heading.start >= end or text[at : heading.start].strip():
                break
            at = min(heading.end, end)
        return at if text[at:end].strip() else end


def _segments(text: str) -> Iterator[tuple[int, int]]:
    """The bounds of parts that are split one at a time, cut where the structure is weakest."""
    start = 0
    while len(text) - start > SEGMENT_CHARS_MAX:
        most = start + SEGMENT_CHARS_MAX
        # Not in the first half: small parts would make small chunks.
        found = (text.rfind(mark, start + SEGMENT_CHARS_MAX // 2, most) for mark in _BREAKS)
        end = next((at for at in found if at >= 0), most)
        yield start, end
        start = end
    yield start, len(text)


def _joined(pages: Sequence[ParsedPage]) -> tuple[str, list[int]]:
    starts: list[int] = []
    at = 0
    for page in pages:
        starts.append(at)
        at += len(page.markdown) + len(BETWEEN_PAGES)
    return BETWEEN_PAGES.join(page.markdown for page in pages), starts


def _headings(page: ParsedPage, at: int) -> Iterator[_Heading]:
    """The ATX headings of a page (CommonMark 4.2), those in fenced code aside."""
    fence = ""
    for line in page.markdown.splitlines(keepends=True):
        bare = line.rstrip("\r\n")
        if mark := _FENCE.match(bare):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence) and not bare[mark.end() :].strip():
                fence = ""
        elif not fence and (found := _HEADING.match(bare)) and found[2].strip():
            yield _Heading(at, at + len(bare), len(found[1]), found[2].strip())
        at += len(line)
