"""Files on their way in: which, under which ids, and following each through its stages."""

from __future__ import annotations

import asyncio
import hashlib
import mimetypes
import os
import re
import stat
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tollgate.corpus.v1 import corpus_pb2 as pb
from tollgate.corpus.v1 import corpus_pb2_grpc
from tollgate.storage.v1 import object_pb2, object_pb2_grpc

from chassis.call import REQUEST_ID, new_request_id
from chassis.errors import TollgateError
from cli.caller import Caller, Unreachable
from cli.command import Misused, described
from cli.together import together

INLINE_BYTES_MAX = 4 << 20
NAME_BYTES_MAX = 1 << 10
PART_BYTES = 512 << 10
BUCKET = "documents"
TOGETHER = 6
_UNREADABLE = "FILE_UNREADABLE"

_ENDED = (pb.DOCUMENT_STATE_READY, pb.DOCUMENT_STATE_FAILED, pb.DOCUMENT_STATE_DEFERRED)
# The share of the work that is done when a stage begins, in percent; within parsing and embedding
# the pages and chunks say how far it is.
_BEGINS = {
    pb.DOCUMENT_STATE_STORED: (5, 10),
    pb.DOCUMENT_STATE_PARSING: (10, 45),
    pb.DOCUMENT_STATE_CHUNKING: (45, 50),
    pb.DOCUMENT_STATE_EMBEDDING: (50, 90),
    pb.DOCUMENT_STATE_INDEXING: (90, 95),
    pb.DOCUMENT_STATE_READY: (100, 100),
}


@dataclass
class Added:
    """A file on its way: what the mesh says of it, or why it was not taken at all."""

    path: Path
    document_id: str
    document: pb.Document = field(default_factory=pb.Document)
    reason: str = ""
    message: str = ""
    percent: int = 0
    is_sending: bool = False
    # For people, and the mesh: as much of the path as tells it from the others.
    name: str = ""

    def __post_init__(self) -> None:
        self.name = self.name or _shown(Path(self.path.name))

    @property
    def state(self) -> str:
        """`waiting`, `storing`, one of the mesh's states, or `failed`."""
        if self.reason:
            return "failed"
        if not self.document.state:
            return "storing" if self.is_sending else "waiting"
        name = pb.DocumentState.Name(self.document.state)
        return name.removeprefix("DOCUMENT_STATE_").lower()

    @property
    def has_failed(self) -> bool:
        """Whether it was refused, or cannot be made searchable."""
        return bool(self.reason) or self.document.state == pb.DOCUMENT_STATE_FAILED

    @property
    def why(self) -> tuple[str, str]:
        """The reason and the message of a document that failed or waits."""
        if self.reason:
            return self.reason, self.message
        return self.document.reason, self.document.message

    @property
    def stage(self) -> str:
        """Where it stands, for people: `embedding 12/40 chunks`."""
        progress, state = self.document.progress, self.document.state
        if self.why[0]:
            # It failed, or it waits: for a budget, or in a stage for what that needs.
            return f"{self.state}: {self.why[0]}"
        if state == pb.DOCUMENT_STATE_PARSING and progress.pages_done:
            total = f"/{progress.pages_total}" if progress.pages_total else ""
            return f"parsing {progress.pages_done}{total} pages"
        if state == pb.DOCUMENT_STATE_EMBEDDING and progress.chunks_total:
            return f"embedding {progress.chunks_done}/{progress.chunks_total} chunks"
        if state == pb.DOCUMENT_STATE_READY:
            pages = counted(progress.pages_total, "page")
            how = " (simulated)" if is_simulated(self.document) else ""
            return f"ready{how}: {pages}, {counted(progress.chunks_total, 'chunk')}"
        return self.state

    def now(self, document: pb.Document) -> None:
        """Take over what the mesh says. What is done never becomes less."""
        self.document = document
        self.percent = max(self.percent, percent_of(document))


def counted(number: int, noun: str) -> str:
    """`1 page`, `6 pages`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def is_simulated(document: pb.Document) -> bool:
    """Whether a mock made its pages or its vectors."""
    return document.parsed_by.simulated or document.embedded_by.simulated


Changed = Callable[[Added], None]


def percent_of(document: pb.Document) -> int:
    """How much of the work on a document is done, 0 to 100."""
    begins, ends = _BEGINS.get(document.state, (0, 0))
    progress = document.progress
    done, total = 0, 0
    if document.state == pb.DOCUMENT_STATE_PARSING:
        done, total = progress.pages_done, progress.pages_total
    elif document.state == pb.DOCUMENT_STATE_EMBEDDING:
        done, total = progress.chunks_done, progress.chunks_total
    return begins + (ends - begins) * min(done, total) // total if total else begins


def files_of(paths: Sequence[Path]) -> list[Added]:
    """The files named, and those in the folders named, sorted; hidden ones are left out.

    What is there and cannot be read is among them, as failed, with why. Raises Misused where there
    is nothing under a name.
    """
    found: dict[Path, str] = {}
    for path in paths:
        if os.path.isdir(path):
            found |= {file: why for file, why in sorted(_inside(path).items()) if file not in found}
        elif os.path.lexists(path):
            found.setdefault(path, _unreadable(path))
        else:
            raise Misused(f"there is no file {path}")
    if not found:
        raise Misused(f"there are no files in {', '.join(map(str, paths))}")
    files = [
        Added(path, document_id(path), reason=_UNREADABLE if why else "", message=why)
        for path, why in found.items()
    ]
    for file, name in zip(files, names_apart(list(found)), strict=True):
        file.name = name
    return files


def _inside(folder: Path) -> dict[Path, str]:
    """What is in a folder and below that is no folder, and why it cannot be read, or nothing."""
    found: dict[Path, str] = {}

    def untold(error: OSError) -> None:
        found[Path(error.filename)] = error.strerror or str(error)

    for place, folders, names in os.walk(folder, onerror=untold):
        folders[:] = [name for name in folders if not name.startswith(".")]
        # A walk lists a link to a folder among the folders, and does not follow it.
        links = [name for name in folders if (Path(place) / name).is_symlink()]
        for name in (*links, *names):
            if not name.startswith("."):
                path = Path(place) / name
                found[path] = _unreadable(path)
    return found


def _unreadable(path: Path) -> str:
    """Why a path cannot be read as a file; empty where it can. Opens nothing but files."""
    try:
        kind = path.stat().st_mode
        if stat.S_ISREG(kind):
            path.open("rb").close()
            return ""
    except FileNotFoundError:
        return "it is a link to something that is not there"
    except OSError as error:
        return error.strerror or str(error)
    if stat.S_ISDIR(kind):
        return "it is a link to a folder, which is not followed"
    return "it is a named pipe" if stat.S_ISFIFO(kind) else "it is no regular file"


def names_apart(paths: Sequence[Path]) -> list[str]:
    """The shortest end of each path that no other of them has: `a.md`, or `old/a.md`."""
    parts = [path.absolute().parts for path in paths]
    ends = Counter(part[-n:] for part in parts for n in range(1, len(part) + 1))
    return [_shown(_end_apart(part, ends)) for part in parts]


def _end_apart(parts: tuple[str, ...], ends: Counter[tuple[str, ...]]) -> Path:
    for length in range(1, len(parts)):
        if ends[parts[-length:]] == 1:
            return Path(*parts[-length:])
    return Path(*parts)


def _shown(path: Path) -> str:
    """A path as text that can be printed and sent, whatever bytes are in its name."""
    text = str(path).encode("utf-8", "replace").decode()
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def document_id(path: Path) -> str:
    """The id of a file's document: its name, readable, and a digest of its place.

    The same file always has the same id, so that adding it again adds a revision. At most 128
    letters, digits, dots, underscores and hyphens.
    """
    place = hashlib.sha256(os.path.realpath(path).encode("utf-8", "surrogateescape")).hexdigest()[
        :8
    ]
    slug = re.sub(r"[^A-Za-z0-9._-]+", "-", path.name).strip("-.") or "document"
    return f"{slug[:100]}-{place}"


class Adding:
    """Adds files through the router, a few at a time; `changed` is told of every step."""

    def __init__(
        self, router: Caller, *, collection: str, watch: bool, changed: Changed = lambda _: None
    ) -> None:
        self._router, self._collection, self._watch = router, collection, watch
        self._changed = changed
        self._corpus = corpus_pb2_grpc.CorpusServiceStub(router.channel)
        self._objects = object_pb2_grpc.ObjectServiceStub(router.channel)
        self._places = asyncio.Semaphore(TOGETHER)

    async def all(self, files: Sequence[Added]) -> None:
        """Add them all. A file that is refused does not stop the others; an absent router does.

        Raises Unreachable.
        """
        await together(*(self._one(file) for file in files))

    async def _one(self, file: Added) -> None:
        if file.reason:
            self._changed(file)
            return
        async with self._places:
            try:
                file.is_sending = True
                self._changed(file)
                await self._add(file)
                if self._watch:
                    await self._follow(file)
            except TollgateError as error:
                file.reason, file.message = error.reason, described(error)
            except OSError as error:
                file.reason, file.message = _UNREADABLE, error.strerror or str(error)
            self._changed(file)

    async def _add(self, file: Added) -> None:
        size = file.path.stat().st_size
        request = pb.AddDocumentRequest(
            document_id=file.document_id,
            collection=self._collection,
            file_name=file.name.encode()[-NAME_BYTES_MAX:].decode(errors="ignore"),
            media_type=mimetypes.guess_type(file.path.name)[0] or "",
        )
        # One request id for the upload and all that follows from it.
        metadata = [(REQUEST_ID, new_request_id())]
        if size > INLINE_BYTES_MAX:
            await self._store(file, size, metadata)
            request.object.bucket, request.object.name = BUCKET, file.document_id
        else:
            request.content = await asyncio.to_thread(file.path.read_bytes)
        answer = await self._router.unary(
            self._corpus.AddDocument, request, metadata=metadata, timeout_s=120
        )
        file.now(answer.document)
        self._changed(file)

    async def _store(self, file: Added, size: int, metadata: list[tuple[str, str]]) -> None:
        bucket = object_pb2.CreateBucketRequest(bucket=BUCKET)
        await self._router.unary(self._objects.CreateBucket, bucket, metadata=metadata)
        header = object_pb2.PutObjectHeader(
            bucket=BUCKET,
            name=file.document_id,
            max_bytes=size,
            content_type=mimetypes.guess_type(file.path.name)[0] or "",
        )
        await self._router.upload(
            self._objects.PutObject, _parts(header, file, size, self._changed), metadata=metadata
        )

    async def _follow(self, file: Added) -> None:
        """Watch a document to its end. A connection that broke is taken up again."""
        lost = 0
        request = pb.WatchDocumentRequest(collection=self._collection, document_id=file.document_id)
        while file.document.state not in _ENDED:
            try:
                async for answer in self._router.stream(self._corpus.WatchDocument, request):
                    lost = 0
                    file.now(answer.document)
                    self._changed(file)
                    if answer.document.state in _ENDED:
                        return
            except Unreachable:
                lost += 1
                if lost > 60:
                    raise
            except TollgateError as error:
                lost += 1
                # Work goes on in the mesh; only the watching was interrupted.
                if lost > 60 or error.code not in {"UNAVAILABLE", "UNKNOWN", "DEADLINE_EXCEEDED"}:
                    raise
            await asyncio.sleep(0.5)


async def _parts(
    header: object_pb2.PutObjectHeader, file: Added, size: int, changed: Changed
) -> AsyncIterator[object_pb2.PutObjectRequest]:
    yield object_pb2.PutObjectRequest(header=header)
    sent = 0
    with file.path.open("rb") as content:
        while part := await asyncio.to_thread(content.read, PART_BYTES):
            yield object_pb2.PutObjectRequest(data=part)
            sent += len(part)
            file.percent = min(5, 5 * sent // max(1, size))
            changed(file)
