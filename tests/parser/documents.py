"""Small documents of every kind, good and hostile, made by hand: tests carry their own."""

from __future__ import annotations

import io
import zipfile
import zlib

MIB = 1024 * 1024

_TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
_RELATIONS = "http://schemas.openxmlformats.org/package/2006/relationships"
_OFFICE = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
_WORD = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
_SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
_SLIDE = "http://schemas.openxmlformats.org/presentationml/2006/main"
_DRAWING = "http://schemas.openxmlformats.org/drawingml/2006/main"
_KIND = "application/vnd.openxmlformats-officedocument"


# PDF ------------------------------------------------------------------------------------------


def pdf(pages: list[list[str]], *, encrypt: str = "") -> bytes:
    """A PDF of these pages of lines; a line that begins with `# ` is set large."""
    return _pdf([_lines(lines) for lines in pages], encrypt)


def encrypted_pdf() -> bytes:
    """A PDF that says it is encrypted, with keys that no password opens."""
    keys = f"/O <{'41' * 32}> /U <{'42' * 32}>"
    return pdf([["secret"]], encrypt=f"/Encrypt << /Filter /Standard /V 1 /R 2 {keys} /P -4 >>")


def image_pdf() -> bytes:
    """A PDF of one page that shows a rectangle and no text."""
    return _pdf([b"0 0 100 100 re f"], "")


def bomb_pdf(mib: int) -> bytes:
    """A small PDF whose one page unpacks to that many MiB of text."""
    show = b"(It goes on and on.) Tj T* "
    return _pdf([b"BT /F1 1 Tf 1 TL 72 700 Td " + show * (mib * MIB // len(show)) + b"ET"], "")


def _lines(lines: list[str]) -> bytes:
    shown, height = [], 740.0
    for line in lines:
        size = 24 if line.startswith("# ") else 11
        words = line.removeprefix("# ").replace("(", r"\(").replace(")", r"\)")
        shown.append(f"BT /F1 {size} Tf 72 {height} Td ({words}) Tj ET")
        height -= size * 1.5
    return "\n".join(shown).encode("latin-1")


def _pdf(streams: list[bytes], encrypt: str) -> bytes:
    kids = " ".join(f"{4 + 2 * index} 0 R" for index in range(len(streams)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(streams)} >>".encode(),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    for index, stream in enumerate(streams):
        packed = zlib.compress(stream)
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] "
            b"/Resources << /Font << /F1 3 0 R >> >> "
            + f"/Contents {5 + 2 * index} 0 R >>".encode()
        )
        head = f"<< /Length {len(packed)} /Filter /FlateDecode >>\nstream\n".encode()
        objects.append(head + packed + b"\nendstream")
    out, offsets = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, 1):
        offsets.append(len(out))
        out += f"{number} 0 obj\n".encode() + body + b"\nendobj\n"
    table = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{offset:010} 00000 n \n".encode() for offset in offsets)
    out += f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R {encrypt} ".encode()
    out += f"/ID [<00> <00>] >>\nstartxref\n{table}\n%%EOF\n".encode()
    return bytes(out)


# Office ---------------------------------------------------------------------------------------


def docx(paragraphs: list[str]) -> bytes:
    """A DOCX of these paragraphs; one that begins with `# ` is a heading."""
    return docx_of("".join(_paragraph(words) for words in paragraphs))


def docx_of(body: str) -> bytes:
    """A DOCX with this XML as its body."""
    styles = f"""<w:styles xmlns:w="{_WORD}"><w:style w:type="paragraph" w:styleId="Heading1">
      <w:name w:val="heading 1"/><w:pPr><w:outlineLvl w:val="0"/></w:pPr></w:style></w:styles>"""
    return archive(
        {
            "[Content_Types].xml": _content_types(
                {
                    "/word/document.xml": "wordprocessingml.document.main",
                    "/word/styles.xml": "wordprocessingml.styles",
                }
            ),
            "_rels/.rels": _relations([("officeDocument", "word/document.xml")]),
            "word/_rels/document.xml.rels": _relations([("styles", "styles.xml")]),
            "word/styles.xml": styles,
            "word/document.xml": f'<w:document xmlns:w="{_WORD}"><w:body>{body}</w:body>'
            "</w:document>",
        }
    )


def pptx(slides: list[tuple[str, str]]) -> bytes:
    """A PPTX of slides with a title and a body each."""
    numbers = range(1, len(slides) + 1)
    listed = "".join(f'<p:sldId id="{255 + n}" r:id="rId{n}"/>' for n in numbers)
    names = f'xmlns:p="{_SLIDE}" xmlns:r="{_OFFICE}" xmlns:a="{_DRAWING}"'
    parts = {
        "[Content_Types].xml": _content_types(
            {"/ppt/presentation.xml": "presentationml.presentation.main"}
            | {f"/ppt/slides/slide{n}.xml": "presentationml.slide" for n in numbers}
        ),
        "_rels/.rels": _relations([("officeDocument", "ppt/presentation.xml")]),
        "ppt/presentation.xml": f"<p:presentation {names}><p:sldIdLst>{listed}</p:sldIdLst>"
        "</p:presentation>",
        "ppt/_rels/presentation.xml.rels": _relations(
            [("slide", f"slides/slide{n}.xml") for n in numbers]
        ),
    }
    for number, (title, body) in zip(numbers, slides, strict=True):
        shapes = _shape(2, 'type="title"', title) + _shape(3, 'idx="1"', body)
        parts[f"ppt/slides/slide{number}.xml"] = (
            f"<p:sld {names}><p:cSld><p:spTree><p:nvGrpSpPr>"
            '<p:cNvPr id="1" name=""/><p:cNvGrpSpPr/><p:nvPr/></p:nvGrpSpPr><p:grpSpPr/>'
            f"{shapes}</p:spTree></p:cSld></p:sld>"
        )
    return archive(parts)


def xlsx(sheets: dict[str, list[list[str]]]) -> bytes:
    """An XLSX of named sheets of rows of cells."""
    numbers = range(1, len(sheets) + 1)
    listed = "".join(
        f'<sheet name="{name}" sheetId="{n}" r:id="rId{n}"/>'
        for n, name in zip(numbers, sheets, strict=True)
    )
    parts = {
        "[Content_Types].xml": _content_types(
            {"/xl/workbook.xml": "spreadsheetml.sheet.main"}
            | {f"/xl/worksheets/sheet{n}.xml": "spreadsheetml.worksheet" for n in numbers}
        ),
        "_rels/.rels": _relations([("officeDocument", "xl/workbook.xml")]),
        "xl/workbook.xml": f'<workbook xmlns="{_SHEET}" xmlns:r="{_OFFICE}">'
        f"<sheets>{listed}</sheets></workbook>",
        "xl/_rels/workbook.xml.rels": _relations(
            [("worksheet", f"worksheets/sheet{n}.xml") for n in numbers]
        ),
    }
    for number, rows in zip(numbers, sheets.values(), strict=True):
        cells = "".join(
            f'<row r="{y}">'
            + "".join(
                f'<c r="{chr(65 + x)}{y}" t="inlineStr"><is><t>{value}</t></is></c>'
                for x, value in enumerate(row)
            )
            + "</row>"
            for y, row in enumerate(rows, 1)
        )
        parts[f"xl/worksheets/sheet{number}.xml"] = (
            f'<worksheet xmlns="{_SHEET}"><sheetData>{cells}</sheetData></worksheet>'
        )
    return archive(parts)


def bomb_docx(mib: int) -> bytes:
    """A small DOCX whose text unpacks to that many MiB."""
    return docx_of(f"<w:p><w:r><w:t>{'a' * (mib * MIB)}</w:t></w:r></w:p>")


def old_doc() -> bytes:
    """The start of a file as Word wrote it before 2007: a compound file."""
    return b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + b"\0" * 1016 + "WordDocument".encode("utf-16-le")


def encrypted_office() -> bytes:
    """What a DOCX with a password is: a compound file with the entry `EncryptedPackage`."""
    return old_doc() + "EncryptedPackage".encode("utf-16-le") + b"\0" * 512


def archive(parts: dict[str, str]) -> bytes:
    """A ZIP archive of these parts."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in parts.items():
            opened.writestr(name, content)
    return packed.getvalue()


def _content_types(parts: dict[str, str]) -> str:
    listed = "".join(
        f'<Override PartName="{name}" ContentType="{_KIND}.{kind}+xml"/>'
        for name, kind in parts.items()
    )
    relations = "application/vnd.openxmlformats-package.relationships+xml"
    return (
        f'<Types xmlns="{_TYPES}"><Default Extension="rels" ContentType="{relations}"/>'
        f'<Default Extension="xml" ContentType="application/xml"/>{listed}</Types>'
    )


def _relations(targets: list[tuple[str, str]]) -> str:
    listed = "".join(
        f'<Relationship Id="rId{n}" Type="{_OFFICE}/{kind}" Target="{target}"/>'
        for n, (kind, target) in enumerate(targets, 1)
    )
    return f'<Relationships xmlns="{_RELATIONS}">{listed}</Relationships>'


def _paragraph(words: str) -> str:
    style = '<w:pPr><w:pStyle w:val="Heading1"/></w:pPr>' if words.startswith("# ") else ""
    return f"<w:p>{style}<w:r><w:t>{words.removeprefix('# ')}</w:t></w:r></w:p>"


def _shape(number: int, placeholder: str, words: str) -> str:
    return (
        f'<p:sp><p:nvSpPr><p:cNvPr id="{number}" name="s{number}"/><p:cNvSpPr/>'
        f"<p:nvPr><p:ph {placeholder}/></p:nvPr></p:nvSpPr><p:spPr/><p:txBody><a:bodyPr/>"
        f"<a:p><a:r><a:t>{words}</a:t></a:r></a:p></p:txBody></p:sp>"
    )


# HTML -----------------------------------------------------------------------------------------


def deep_html(levels: int) -> bytes:
    """HTML with one sentence that many elements deep."""
    return b"<html><body>" + b"<div>" * levels + b"the bottom" + b"</div>" * levels
