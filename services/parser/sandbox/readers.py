"""Readers of documents: bytes in, pages out. Runs in the worker, never in the daemon.

Each reader raises Unreadable (with a Fault) or Locked; anything else that a parser throws, Rust
panics included, is taken for a malformed document by the worker.
"""

from __future__ import annotations

import codecs
import io
import itertools
import re
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape
from html.parser import HTMLParser

import anydoc
import html_to_markdown
from anydoc import Format
from liteparse import LiteParse
from liteparse.types import ParseBatch, ParsedPage, ParseError

from services.parser.media import Media, hinted, looks_textual, pdf_offset, sniff
from services.parser.sandbox.frames import PAGE_BYTES_MAX, Fault

PAGE_CHARS_MAX = 256 * 1024
"""Where a text without pages of its own is cut, at the end of a line where there is one."""

SLIM_BYTES_MAX = 64 * 1024 * 1024
"""The most that is unpacked to take a presentation or workbook apart; larger ones stay whole."""

HTML_DEPTH_MAX = 256
"""Elements nested deeper than this lose their tags and keep their text."""

_ENCRYPTED_PACKAGE = "EncryptedPackage".encode("utf-16-le")
# Declared encodings that are honoured in HTML; looked up at start, since codecs load lazily.
_CHARSETS = ("cp1252", "iso8859-15", "cp1251", "koi8-r", "shift_jis", "euc-jp", "gb18030", "big5")
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w-]{2,40})", re.IGNORECASE)
_WESTERN = {"iso-8859-1", "latin1", "latin-1", "us-ascii", "windows-1252"}
# C0 controls but tab and line feed: PostgreSQL stores no NUL, and no reader shows the others.
_CONTROLS = {code: None for code in range(32) if code not in (9, 10)}


class Unreadable(Exception):
    """The document gives no pages; why, and what it seems to be."""

    def __init__(self, fault: str, media_type: str = "", count: int = 0) -> None:
        super().__init__(fault)
        self.fault = fault
        self.media_type = media_type
        self.count = count


class Locked(Exception):
    """The document needs a password."""

    def __init__(self, media_type: str) -> None:
        super().__init__(media_type)
        self.media_type = media_type


@dataclass(frozen=True, slots=True)
class Sheet:
    """One page's content."""

    markdown: str
    text: str


@dataclass(frozen=True, slots=True)
class Opened:
    """An opened document: its type, how many pages it has, and they, read as they are taken."""

    media_type: str
    pages: int
    sheets: Iterator[Sheet]


def open_document(content: bytes, media_type: str, file_name: str) -> Opened:
    """Open a document of any type that is read. Raises Unreadable or Locked."""
    if not content:
        raise Unreadable(Fault.EMPTY)
    hint = hinted(media_type, file_name)
    found = sniff(content, hint)
    if found in (Media.ZIP, Media.OLE):
        found = _container(content, found, hint)
    reader = _READERS.get(found)
    if reader is None:
        raise Unreadable(Fault.UNSUPPORTED, found)
    return reader(content)


def warm_up() -> None:
    """Load everything that is loaded on first use: after this the worker may lose its files."""
    for charset in (*_CHARSETS, "cp437", "utf-16", "utf-8-sig"):
        codecs.lookup(charset)
    samples = (_SAMPLE_PDF, b"# A\n\n*b*", b"<html><p>a</p>", _sample_zip(), b"\x80", b"")
    for sample in samples:
        try:
            list(open_document(sample, "", "").sheets)
        except (Unreadable, Locked):
            continue
    list(_apart(_sample_zip(), "list.xml", "entry"))


# PDF ------------------------------------------------------------------------------------------

_PDF = LiteParse(ocr_enabled=False, output_format="markdown", image_mode="off", quiet=True)


def _open_pdf(content: bytes) -> Opened:
    offset = pdf_offset(content)
    if offset < 0:
        raise Unreadable(Fault.MALFORMED, Media.PDF)
    batches = _pdf_batches(content[offset:] if offset else content)
    first = next(batches, None)
    if first is None:
        raise Unreadable(Fault.MALFORMED, Media.PDF)
    pages = (page for batch in itertools.chain([first], batches) for page in batch.result.pages)
    return Opened(Media.PDF, first.total_pages, (_pdf_sheet(page) for page in pages))


def _pdf_batches(content: bytes) -> Iterator[ParseBatch]:
    try:
        yield from _PDF.parse_batches(content, 1)
    except ParseError as error:
        words = str(error).lower()
        if "password" in words or "security handler" in words:
            raise Locked(Media.PDF) from None
        raise Unreadable(Fault.MALFORMED, Media.PDF) from None


def _pdf_sheet(page: ParsedPage) -> Sheet:
    text = _tidy(page.text)
    # A page of images alone comes as an empty fence.
    markdown = _clean(page.markdown or "").strip() if text else ""
    sheet = Sheet(_harmless(markdown), text)
    if len(sheet.markdown.encode()) + len(text.encode()) > PAGE_BYTES_MAX:
        raise Unreadable(Fault.PAGE_TOO_LARGE, Media.PDF, page.page_num)
    return sheet


# Office ---------------------------------------------------------------------------------------

_OFFICE: dict[str, Media] = {"docx": Media.DOCX, "pptx": Media.PPTX, "xlsx": Media.XLSX}
_FOREIGN_OFFICE: dict[str, str] = {
    "doc": "application/msword",
    "ppt": "application/vnd.ms-powerpoint",
    "odt": "application/vnd.oasis.opendocument.text",
    "ods": "application/vnd.oasis.opendocument.spreadsheet",
    "odp": "application/vnd.oasis.opendocument.presentation",
    "epub": "application/epub+zip",
}


def _container(content: bytes, found: str, hint: str) -> str:
    """What a ZIP or compound file holds."""
    if found == Media.OLE:
        # A new Office file that was given a password is a compound file ([MS-OFFCRYPTO] 2.3.4).
        if _ENCRYPTED_PACKAGE in content:
            raise Locked(hint if hint in _OFFICE.values() else Media.OLE)
        return _FOREIGN_OFFICE.get(anydoc.format_from_bytes(content) or "", Media.OLE)
    inside = anydoc.format_from_bytes(content)
    if inside in _OFFICE:
        return _OFFICE[inside]
    if inside in _FOREIGN_OFFICE:
        return _FOREIGN_OFFICE[inside]
    if hint in _OFFICE.values() or not zipfile.is_zipfile(io.BytesIO(content)):
        raise Unreadable(Fault.MALFORMED, hint or Media.ZIP)
    return Media.ZIP


def _open_docx(content: bytes) -> Opened:
    return _paged(Media.DOCX, [_office(content, "docx", Media.DOCX)])


def _open_pptx(content: bytes) -> Opened:
    slides = _apart(content, "ppt/presentation.xml", "sldId")
    return _paged(Media.PPTX, [_office(slide, "pptx", Media.PPTX) for _, slide in slides])


def _open_xlsx(content: bytes) -> Opened:
    sheets = list(_apart(content, "xl/workbook.xml", "sheet"))
    texts = [(name, _office(sheet, "xlsx", Media.XLSX)) for name, sheet in sheets]
    return _paged(Media.XLSX, [_titled(name, text) for name, text in texts])


def _titled(name: str, markdown: str) -> str:
    heading = f"## {' '.join(name.split())}"
    if not name or not markdown.strip() or markdown.startswith(heading):
        return markdown
    return f"{heading}\n\n{markdown}"


def _office(content: bytes, kind: Format, media_type: str) -> str:
    try:
        return anydoc.to_markdown_bytes(content, kind)
    except anydoc.EncryptedError:
        raise Locked(media_type) from None
    except anydoc.ResourceLimitError as error:
        fault = Fault.NESTED if "depth" in error.limit else Fault.EXPANDS
        raise Unreadable(fault, media_type) from None
    except anydoc.ConvertError:
        raise Unreadable(Fault.MALFORMED, media_type) from None


def _apart(content: bytes, part: str, element: str) -> Iterator[tuple[str, bytes]]:
    """The package once for each `element` listed in `part`, with the others taken off the list.

    The converter marks neither slides nor sheets, so each is converted alone. Yields the element's
    name and the package; the whole package where it cannot be taken apart.
    """
    try:
        slim, listing = _slim(content, part)
        names = [entry.get("name", "") for _, entry in _entries(_root(listing), element)]
    except (zipfile.BadZipFile, ElementTree.ParseError, KeyError, ValueError, NotImplementedError):
        names = []
    if len(names) < 2:
        yield (names[0] if names else "", content)
        return
    for keep, name in enumerate(names):
        yield name, _keeping(slim, part, listing, element, keep)


def _slim(content: bytes, part: str) -> tuple[bytes, bytes]:
    """The package without its media and stored plainly, and the listing part."""
    packed = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as source,
        zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as target,
    ):
        kept = [info for info in source.infolist() if "/media/" not in info.filename]
        if sum(info.file_size for info in kept) > SLIM_BYTES_MAX:
            raise ValueError("too large to take apart")
        for info in kept:
            target.writestr(info.filename, source.read(info))
        listing = source.read(part)
    return packed.getvalue(), listing


_Entry = tuple[ElementTree.Element, ElementTree.Element]


def _root(listing: bytes) -> ElementTree.Element:
    return ElementTree.fromstring(listing)  # noqa: S314  # a bomb goes off in the sandbox


def _entries(root: ElementTree.Element, element: str) -> list[_Entry]:
    """The elements of that local name below the root, each with its parent."""
    return [
        (parent, child)
        for parent in root.iter()
        for child in parent
        if child.tag.rsplit("}", 1)[-1] == element
    ]


def _keeping(slim: bytes, part: str, listing: bytes, element: str, keep: int) -> bytes:
    root = _root(listing)
    for position, (parent, entry) in enumerate(_entries(root, element)):
        if position != keep:
            parent.remove(entry)
    package = io.BytesIO(slim)
    with zipfile.ZipFile(package, "a", zipfile.ZIP_STORED) as archive:
        archive.filelist.remove(archive.NameToInfo.pop(part))
        archive.writestr(part, ElementTree.tostring(root, "utf-8", xml_declaration=True))
    return package.getvalue()


# HTML -----------------------------------------------------------------------------------------

_HTML = html_to_markdown.ConversionOptions(
    extract_metadata=False,
    compact_tables=True,
    inline_data_media="alt_text_only",
    exclude_selectors=["nav", "script", "style"],
    preprocessing=html_to_markdown.PreprocessingOptions(
        enabled=True, remove_navigation=False, remove_forms=False
    ),
)


def _open_html(content: bytes) -> Opened:
    html = _decoded(content, Media.HTML)
    converted = html_to_markdown.convert(html, _HTML)
    if any("depth" in str(warning.kind) for warning in converted.warnings):
        converted = html_to_markdown.convert(_shallow(html), _HTML)
    return _paged(Media.HTML, [converted.content or ""])


def _shallow(html: str) -> str:
    flat = _Shallow()
    flat.feed(html)
    flat.close()
    return "".join(flat.kept)


class _Shallow(HTMLParser):
    """Writes HTML again without the tags below a depth; their text stays. Does not recurse."""

    _VOID = frozenset({"br", "hr", "img", "input", "meta", "link", "wbr", "col", "area", "source"})

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.kept: list[str] = []
        self._depth = 0
        self._silent = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the tag above the depth, a space for it below."""
        self._silent = tag in ("script", "style")
        if tag not in self._VOID:
            self._depth += 1
        above = self._depth <= HTML_DEPTH_MAX
        self.kept.append((self.get_starttag_text() or "") if above else " ")

    def handle_endtag(self, tag: str) -> None:
        """Keep the tag where its start was kept."""
        self._silent = False
        self.kept.append(f"</{tag}>" if self._depth <= HTML_DEPTH_MAX else " ")
        self._depth = max(0, self._depth - 1)

    def handle_data(self, data: str) -> None:
        """Keep the text, but of scripts and styles."""
        if not self._silent:
            self.kept.append(escape(data, quote=False))


# Text -----------------------------------------------------------------------------------------


def _open_markdown(content: bytes) -> Opened:
    return _paged(Media.MARKDOWN, [_decoded(content, Media.MARKDOWN)])


def _open_text(content: bytes) -> Opened:
    pages = _decoded(content, Media.TEXT).split("\f")
    return _paged(Media.TEXT, pages, plain=lambda text: text)


def _decoded(content: bytes, media_type: str) -> str:
    """The bytes as text: by their byte order mark, as UTF-8, or as HTML declares."""
    try:
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = content.decode("utf-16")
        else:
            text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        declared = _declared(content) if media_type == Media.HTML else None
        if declared is None:
            raise Unreadable(Fault.NOT_UTF8, media_type) from None
        text = declared
    if "\0" in text[:4096] or not looks_textual(text[:4096].encode("utf-8", "replace")):
        raise Unreadable(Fault.MALFORMED, media_type)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _declared(content: bytes) -> str | None:
    """HTML decoded as its own words say, where they name an encoding that is honoured."""
    match = _CHARSET.search(content[:2048])
    name = match[1].decode("ascii").lower() if match else ""
    charset = "cp1252" if name in _WESTERN else name.replace("windows-", "cp")
    return content.decode(charset, "replace") if charset in _CHARSETS else None


# Pages ----------------------------------------------------------------------------------------


def _paged(media_type: str, units: list[str], plain: Callable[[str], str] | None = None) -> Opened:
    """Pages of Markdown units (a slide, a sheet, a whole text), over-long ones cut."""
    to_text = plain or as_text
    pieces = [piece for unit in units for piece in cut(_harmless(_clean(unit)).strip("\n"))]
    return Opened(media_type, len(pieces), (Sheet(p, _tidy(to_text(p))) for p in pieces))


def cut(text: str) -> Iterator[str]:
    """The text in pieces of at most PAGE_CHARS_MAX, cut after a line where that is possible."""
    start = 0
    while len(text) - start > PAGE_CHARS_MAX:
        end = text.rfind("\n", start, start + PAGE_CHARS_MAX) + 1
        end = end if end > start else start + PAGE_CHARS_MAX
        yield text[start:end].strip("\n")
        start = end
    yield text[start:]


def _clean(text: str) -> str:
    """The text without control characters and lone surrogates."""
    return text.translate(_CONTROLS).encode("utf-8", "ignore").decode()


def _tidy(text: str) -> str:
    """Clean text without trailing blanks and with at most one empty line in a row."""
    lines = "\n".join(line.rstrip() for line in _clean(text).split("\n"))
    return re.sub(r"\n{3,}", "\n\n", lines).strip("\n")


_LINK = re.compile(r"\]\((<[^>\n]{0,2000}>|[^)\n]{0,2000})\)")


def _harmless(markdown: str) -> str:
    """The Markdown without links that run scripts."""
    return _LINK.sub(_without_script, markdown)


def _without_script(link: re.Match[str]) -> str:
    target = "".join(link[1].strip("<>").split()).lower()
    return "](#)" if target.startswith(("javascript:", "vbscript:", "data:text")) else link[0]


_MARKS = (
    (re.compile(r"^\s{0,3}(?:```|~~~).*$", re.MULTILINE), ""),
    (re.compile(r"^\|?[ :|-]*---[ :|-]*$\n?", re.MULTILINE), ""),
    (re.compile(r"^\s{0,3}(?:#{1,6} |> ?)", re.MULTILINE), ""),
    (re.compile(r"^\| ?| ?\|$", re.MULTILINE), ""),
    (re.compile(r" \| "), "\t"),
    (re.compile(r"!?\[([^\[\]\n]{0,1000})\]\((?:<[^>\n]{0,2000}>|[^)\n]{0,2000})\)"), r"\1"),
    (re.compile(r"\*\*|__|~~|(?<!\\)`"), ""),
    (re.compile(r"(?<![\w\\*])\*([^\s*][^*\n]{0,500})\*(?![\w*])"), r"\1"),
    (re.compile(r"\\([\\`*_{}\[\]()#+.!|<>~-])"), r"\1"),
)


def as_text(markdown: str) -> str:
    """Markdown without its marks: table cells are tab-separated, links keep their words."""
    for mark, instead in _MARKS:
        markdown = mark.sub(instead, markdown)
    return markdown


_READERS: dict[str, Callable[[bytes], Opened]] = {
    Media.PDF: _open_pdf,
    Media.DOCX: _open_docx,
    Media.PPTX: _open_pptx,
    Media.XLSX: _open_xlsx,
    Media.HTML: _open_html,
    Media.MARKDOWN: _open_markdown,
    Media.TEXT: _open_text,
}


def _sample_zip() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("list.xml", "<list xmlns='urn:l'><entry/><entry/></list>")
    return packed.getvalue()


_SAMPLE_PDF = b"""%PDF-1.4
1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj
2 0 obj<</Type/Pages/Kids[3 0 R]/Count 1>>endobj
3 0 obj<</Type/Page/Parent 2 0 R/MediaBox[0 0 99 99]/Contents 4 0 R/Resources<</Font<</F 5 0 R>>>>>>
endobj
4 0 obj<</Length 33>>stream
BT /F 9 Tf 9 9 Td (warm) Tj ET    
endstream endobj
5 0 obj<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>endobj
trailer<</Root 1 0 R/Size 6>>
"""
