"""Telling what a document is: its bytes first, then what the caller said, then its name's ending.

Only signatures are looked at here, never the inside of a container: that is the sandbox's work.
"""

from __future__ import annotations

import re
from enum import StrEnum


class Media(StrEnum):
    """The media types that are read, and the containers that need a look inside."""

    PDF = "application/pdf"
    DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
    PPTX = "application/vnd.openxmlformats-officedocument.presentationml.presentation"
    XLSX = "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet"
    HTML = "text/html"
    MARKDOWN = "text/markdown"
    TEXT = "text/plain"
    ZIP = "application/zip"
    OLE = "application/x-ole-storage"
    BINARY = "application/octet-stream"


READABLE = (
    Media.PDF,
    Media.DOCX,
    Media.PPTX,
    Media.XLSX,
    Media.HTML,
    Media.MARKDOWN,
    Media.TEXT,
)
"""What the local provider reads."""

TEXTUAL = (Media.HTML, Media.MARKDOWN, Media.TEXT)
"""What has no signature of its own that is sure, and is told from hints."""

PDF_HEADER_WITHIN_BYTES = 1024
"""Readers accept a PDF's header this late (ISO 32000-1, Annex H, implementation note 13)."""

OLE_SIGNATURE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"
"""The first bytes of a compound file ([MS-CFB] 2.2): old Office files, and encrypted new ones."""

_ENDINGS = {
    "pdf": Media.PDF,
    "docx": Media.DOCX,
    "pptx": Media.PPTX,
    "xlsx": Media.XLSX,
    "html": Media.HTML,
    "htm": Media.HTML,
    "xhtml": Media.HTML,
    "md": Media.MARKDOWN,
    "markdown": Media.MARKDOWN,
    "txt": Media.TEXT,
    "text": Media.TEXT,
    "log": Media.TEXT,
}
_SYNONYMS = {
    "application/x-pdf": Media.PDF,
    "application/xhtml+xml": Media.HTML,
    "text/x-markdown": Media.MARKDOWN,
}
# Formats that are known and not read, so that a refusal can name them.
_FOREIGN = (
    (b"\x89PNG\r\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"II*\0", "image/tiff"),
    (b"MM\0*", "image/tiff"),
    (b"\x1f\x8b", "application/gzip"),
    (b"7z\xbc\xaf", "application/x-7z-compressed"),
    (b"\x7fELF", "application/x-executable"),
    (b"{\\rtf", "application/rtf"),
    (b"%!PS", "application/postscript"),
)
_TEXT_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_HTML_START = re.compile(
    rb"\s*(?:<\?xml[^>]{0,200}>\s*)?(?:<!--.{0,2000}?-->\s*)*<(?:!doctype\s+html|html|head|body)\b",
    re.IGNORECASE | re.DOTALL,
)


def hinted(media_type: str, file_name: str) -> str:
    """The type that the caller's words point at: a media type, or empty when they say nothing."""
    said = media_type.split(";")[0].strip().lower()
    if said and said != Media.BINARY:
        return _SYNONYMS.get(said, said)
    ending = file_name.rsplit(".", 1)[-1].lower() if "." in file_name else ""
    return _ENDINGS.get(ending, "")


def pdf_offset(content: bytes) -> int:
    """Where a PDF's header starts within the first 1,024 bytes; -1 where there is none."""
    return content.find(b"%PDF-", 0, PDF_HEADER_WITHIN_BYTES + len(b"%PDF-"))


def sniff(content: bytes, hint: str) -> str:
    """The media type of the bytes, given the hint that `hinted` made of the caller's words.

    What cannot be told from a signature is as hinted; without a hint it is text, or
    `application/octet-stream` where the bytes are not like text.
    """
    offset = pdf_offset(content)
    if offset == 0 or (offset > 0 and hint not in TEXTUAL):
        return Media.PDF
    if content.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        return Media.ZIP
    if content.startswith(OLE_SIGNATURE):
        return Media.OLE
    for signature, media_type in _FOREIGN:
        if content.startswith(signature):
            return media_type
    if _HTML_START.match(content.removeprefix(b"\xef\xbb\xbf")[:4096]):
        return Media.HTML
    if hint:
        return Media.TEXT if hint.startswith("text/") and hint not in TEXTUAL else hint
    return Media.TEXT if content.startswith(_TEXT_MARKS) or looks_textual(content) else Media.BINARY


def looks_textual(content: bytes) -> bool:
    """Whether the start of the bytes has no control characters that text does not have."""
    start = content[:4096]
    return not any(byte < 9 or 13 < byte < 27 for byte in start)
