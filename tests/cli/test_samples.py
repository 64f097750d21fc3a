"""The demo's documents: ours, reproducible, and readable."""

from __future__ import annotations

import re

from cli.demo.demo import QUESTIONS, SAMPLES
from cli.demo.write_handbook import HANDBOOK, TEXT, handbook

_SMALL_WORDS = re.compile(r"a|am|do|how|i|in|is|it|the|to|too|when")


def test_the_committed_handbook_is_what_its_script_writes() -> None:
    """The PDF can be made again from its text, to the byte."""
    assert HANDBOOK.read_bytes() == handbook()


def test_the_handbook_is_a_pdf_whose_cross_references_are_right() -> None:
    """Every offset of its table points to the object of that number."""
    content = HANDBOOK.read_bytes()
    start = int(content.rsplit(b"startxref\n", 1)[1].split()[0])
    offsets = re.findall(rb"(\d{10}) 00000 n ", content[start:])
    for number, offset in enumerate(offsets, start=1):
        assert content[int(offset) :].startswith(b"%d 0 obj\n" % number)
    assert len(offsets) > 10


def test_the_questions_share_no_telling_word_with_their_answers() -> None:
    """The searches of the demo cannot be won by matching words."""
    pages = ("\n" + TEXT.read_text()).split("\n# ")[1:]
    for question in QUESTIONS:
        if question.file_name == HANDBOOK.name:
            passage = pages[question.page - 1]
        else:
            passage = (SAMPLES / question.file_name).read_text()
        asked = set(re.findall(r"[a-z]+", question.text.lower()))
        asked = {word for word in asked if not _SMALL_WORDS.fullmatch(word)}
        told = set(re.findall(r"[a-z]+", passage.lower()))
        assert asked
        assert not asked & told, question.text
