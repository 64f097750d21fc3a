"""Writes documents/harbour-handbook.pdf from handbook.txt: `python -m cli.demo.write_handbook`.

The PDF is plain syntax of PDF 1.4, put together here by hand: one content stream a page, the
standard fonts Helvetica and Helvetica-Bold, ruled lines for the table, nothing compressed. The
same text always gives the same bytes, and a test holds the committed file against them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

TEXT = Path(__file__).with_name("handbook.txt")
HANDBOOK = Path(__file__).with_name("documents") / "harbour-handbook.pdf"

# A5 in points, so that a page is a page of a pocket book.
WIDTH, HEIGHT, MARGIN = 420, 595, 48
BODY, HEADING, TITLE = 10, 15, 24

# Advance widths of Helvetica for the characters 32 to 126, in thousandths of the font size:
# Adobe's "Core 14 AFM" metrics.
_WIDTHS = [
    *(278, 278, 355, 556, 556, 889, 667, 191, 333, 333, 389, 584, 278, 333, 278, 278),
    *(556, 556, 556, 556, 556, 556, 556, 556, 556, 556, 278, 278, 584, 584, 584, 556),
    *(1015, 667, 667, 722, 722, 667, 611, 778, 722, 278, 500, 667, 556, 833, 722, 778),
    *(667, 778, 722, 667, 611, 722, 667, 944, 667, 667, 611, 278, 278, 278, 469, 556),
    *(333, 556, 556, 500, 556, 556, 278, 556, 556, 222, 222, 500, 222, 833, 556, 556),
    *(556, 556, 333, 500, 278, 556, 500, 722, 500, 500, 500, 334, 260, 334, 584),
]


@dataclass
class _Pen:
    """Writes down one page, from the top."""

    y: float = HEIGHT - MARGIN
    marks: list[str] = field(default_factory=list)

    def text(self, words: str, *, size: float, bold: bool = False, x: float = MARGIN) -> None:
        escaped = words.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)")
        font = "/F2" if bold else "/F1"
        self.marks.append(f"BT {font} {size} Tf {x:.2f} {self.y:.2f} Td ({escaped}) Tj ET")

    def rule(self, x1: float, y1: float, x2: float, y2: float) -> None:
        self.marks.append(f"{x1:.2f} {y1:.2f} m {x2:.2f} {y2:.2f} l S")

    def paragraph(self, words: str) -> None:
        for line in wrapped(words, BODY, WIDTH - 2 * MARGIN):
            self.text(line, size=BODY)
            self.y -= BODY * 1.4
        self.y -= BODY * 1.2

    def heading(self, words: str, size: float) -> None:
        self.y -= size * 0.4
        self.text(words, size=size, bold=True)
        self.y -= size * 1.6

    def table(self, rows: list[list[str]]) -> None:
        columns, height = len(rows[0]), BODY * 2
        step = (WIDTH - 2 * MARGIN) / columns
        top = self.y + BODY
        for number, row in enumerate(rows):
            self.y = top - height * number - BODY * 1.35
            for column, cell in enumerate(row):
                self.text(cell, size=BODY, bold=number == 0, x=MARGIN + 4 + step * column)
        bottom = top - height * len(rows)
        for number in range(len(rows) + 1):
            self.rule(MARGIN, top - height * number, WIDTH - MARGIN, top - height * number)
        for column in range(columns + 1):
            self.rule(MARGIN + step * column, top, MARGIN + step * column, bottom)
        self.y = bottom - BODY * 2


def wrapped(words: str, size: float, width: float) -> Iterator[str]:
    """The lines of a paragraph of ASCII text set in Helvetica at `size` points."""
    line = ""
    for word in words.split():
        longer = f"{line} {word}".strip()
        if line and sum(_WIDTHS[ord(c) - 32] for c in longer) * size / 1000 > width:
            yield line
            longer = word
        line = longer
    yield line


def _page(text: str, number: int) -> bytes:
    """The content stream of one page: blocks of text that blank lines divide."""
    pen = _Pen()
    for block in text.strip().split("\n\n"):
        if block.startswith("= "):
            pen.heading(block[2:], TITLE)
        elif block.startswith("# "):
            pen.heading(block[2:], HEADING)
        elif block.startswith("|"):
            pen.table(
                [[cell.strip() for cell in row[1:-1].split("|")] for row in block.split("\n")]
            )
        else:
            pen.paragraph(block)
    pen.y = MARGIN / 2
    pen.text(str(number), size=BODY - 2, x=WIDTH / 2)
    return "\n".join(pen.marks).encode("ascii")


def handbook() -> bytes:
    """The whole file: a page for each heading of handbook.txt, the title on the first."""
    first, *others = TEXT.read_text(encoding="ascii").split("\n# ")[1:]
    title = TEXT.read_text(encoding="ascii").split("\n")[0]
    sheets = [f"{title}\n\n# {first}", *(f"# {other}" for other in others)]
    return pdf(sheets, "Saltmere Harbour: handbook")


def pdf(sheets: list[str], title: str) -> bytes:
    """A file of one page a sheet of ASCII text; `=` and `#` begin headings, `|` rows of tables."""
    pages = [_page(sheet, number) for number, sheet in enumerate(sheets, start=1)]
    kids = " ".join(f"{5 + 2 * index} 0 R" for index in range(len(pages)))
    fonts = "/Font << /F1 3 0 R /F2 4 0 R >>"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids [{kids}] >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica-Bold /Encoding /WinAnsiEncoding >>",
    ]
    for index, content in enumerate(pages):
        box = f"/MediaBox [0 0 {WIDTH} {HEIGHT}] /Resources << {fonts} >>"
        contents = f"/Contents {6 + 2 * index} 0 R"
        objects.append(f"<< /Type /Page /Parent 2 0 R {box} {contents} >>".encode())
        objects.append(b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content))
    objects.append(f"<< /Title ({title}) /Author (Tollgate) >>".encode("ascii"))
    return _file(objects)


def _file(objects: list[bytes]) -> bytes:
    """Header, numbered objects, their offsets, trailer; the last object is the information."""
    out = bytearray(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    out += b"trailer\n<< /Size %d /Root 1 0 R /Info %d 0 R >>\n" % (size, len(objects))
    out += b"startxref\n%d\n%%%%EOF\n" % start
    return bytes(out)


if __name__ == "__main__":
    HANDBOOK.write_bytes(handbook())
