"""Objects: names in a catalog, bytes in blobs under opaque keys, and the order that keeps them one.

A write puts its bytes under a key that nobody knows yet, then commits the row that names the key,
then deletes the bytes that the row named before. So an object is visible whole or not at all, and
a crash leaves at worst bytes that no row names, which `sweep` collects.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterable, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from chassis.errors import (
    AlreadyExists,
    Conflict,
    InvalidField,
    NotFound,
    ProviderUnavailable,
    TollgateError,
    Violation,
)
from services.storage.names import (
    PageTokens,
    checked_bucket,
    checked_content_type,
    checked_object_name,
    checked_page_size,
    checked_pairs,
    checked_text,
    past_prefix,
)

log = logging.getLogger(__name__)

WRITE_CHUNK_BYTES_MAX = 1 << 20
READ_CHUNK_BYTES_MAX = 256 << 10
DELETE_NAMES_MAX = 1_000
ETAG_BYTES_MAX = 128
# An object may be replaced between reading its row and opening its bytes; twice is a coincidence.
OPEN_ATTEMPTS = 3


@dataclass(frozen=True, slots=True)
class Bucket:
    """A bucket, and when it was created."""

    name: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Place:
    """Where an object is: its bucket and its name there."""

    bucket: str
    name: str


@dataclass(frozen=True, slots=True)
class Object:
    """A stored object. `etag` changes with every write."""

    place: Place
    size_bytes: int
    content_type: str
    sha256: bytes
    metadata: Mapping[str, str]
    etag: str
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class Draft:
    """An object that is about to be named: everything but the time, which is the catalog's."""

    place: Place
    size_bytes: int
    content_type: str
    sha256: bytes
    metadata: Mapping[str, str]
    blob: str
    etag: str = field(default_factory=lambda: secrets.token_hex(12))


@dataclass(frozen=True, slots=True)
class Entry:
    """An object and the key of its bytes."""

    object: Object
    blob: str


@dataclass(frozen=True, slots=True)
class Condition:
    """What must hold of the object that a write replaces: its etag, or that there is none."""

    if_etag: str = ""
    if_absent: bool = False

    def check(self, place: Place, etag: str | None) -> None:
        """Raises AlreadyExists or Conflict; `etag` is None where there is no object."""
        subject = f"object/{place.bucket}/{place.name}"
        if self.if_absent and etag is not None:
            raise AlreadyExists(
                "an object has the name already", violations=[Violation(subject, "exists")]
            )
        if self.if_etag and self.if_etag != etag:
            raise Conflict(
                "the object does not have the etag given",
                violations=[Violation(subject, "gone" if etag is None else "changed")],
            )


@dataclass(frozen=True, slots=True)
class Header:
    """What an upload says of itself before its bytes."""

    place: Place
    bytes_max: int
    content_type: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    condition: Condition = Condition()


@dataclass(frozen=True, slots=True)
class Download:
    """An object and the bytes of it that were asked for, in chunks of at most 256 KiB."""

    object: Object
    size_bytes: int
    chunks: AsyncIterator[bytes]


class BlobMissing(Exception):
    """No bytes are under this key."""


class Blobs(Protocol):
    """Bytes under opaque keys, never changed once written.

    Everything raises ProviderUnavailable, without the host's paths, where the place of the bytes
    cannot be used.
    """

    async def write(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        """Keep these bytes, durably, under a key that is in no use. A failure leaves nothing."""
        ...

    async def open(self, key: str, offset: int, size_bytes: int) -> AsyncIterator[bytes]:
        """Bytes that stay readable when the key is deleted meanwhile. Raises BlobMissing."""
        ...

    async def copy(self, key: str, to_key: str) -> None:
        """Keep the same bytes under another key as well. Raises BlobMissing."""
        ...

    async def delete(self, keys: Sequence[str]) -> None:
        """Forget these keys; those that are not there are no fault."""
        ...

    def old(self, age_s: float) -> AsyncIterator[list[str]]:
        """The keys that were written this long ago, in batches."""
        ...


class Catalog(Protocol):
    """Objects by name, of one provider. A tenant sees its own alone.

    `missing` makes the NotFound that these raise for a bucket or an object that is not there.
    """

    async def create_bucket(self, tenant: str, name: str) -> Bucket: ...

    async def list_buckets(self, tenant: str, after: str, limit: int) -> list[Bucket]: ...

    async def delete_bucket(self, tenant: str, name: str) -> None:
        """Raises NotFound, and Conflict while there are objects in it."""
        ...

    async def find(self, tenant: str, place: Place) -> Entry | None:
        """The object, or None. Raises NotFound for the bucket."""
        ...

    async def list_objects(
        self, tenant: str, bucket: str, *, after: str, prefix: str, before: str | None, limit: int
    ) -> list[Object]:
        """Objects with after < name, prefix <= name < before, by bytes. NotFound for the bucket."""
        ...

    async def put(
        self, tenant: str, draft: Draft, condition: Condition
    ) -> tuple[Object, str | None]:
        """Name the bytes, if the condition holds; the object and the key it named before."""
        ...

    async def move(
        self, tenant: str, source: Place, target: Place, etag: str
    ) -> tuple[Object, str | None]:
        """Give the object another name; the object and the key that the name had before."""
        ...

    async def remove(self, tenant: str, bucket: str, names: Sequence[str]) -> dict[str, str]:
        """Remove what there is of these; the keys by name. Raises NotFound for the bucket."""
        ...

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        """Those of the keys that no object of any tenant has."""
        ...


def missing(kind: str, name: str) -> NotFound:
    """The error for a bucket, object or space that is not there."""
    return NotFound(f"no {kind} has this name", violations=[Violation(f"{kind}/{name}", "missing")])


class Objects:
    """The rules of objects, over a catalog and blobs, for one provider."""

    def __init__(
        self, catalog: Catalog, blobs: Blobs, tokens: PageTokens, *, object_bytes_max: int
    ) -> None:
        self._catalog = catalog
        self._blobs = blobs
        self._tokens = tokens
        self._object_bytes_max = object_bytes_max

    async def create_bucket(self, tenant: str, name: str) -> Bucket:
        """The bucket, made now or before."""
        return await self._catalog.create_bucket(tenant, checked_bucket("bucket", name))

    async def delete_bucket(self, tenant: str, name: str) -> None:
        """Raises NotFound, and Conflict while there are objects in it."""
        await self._catalog.delete_bucket(tenant, checked_bucket("bucket", name))

    async def list_buckets(
        self, tenant: str, page_size: int, page_token: str
    ) -> tuple[list[Bucket], str]:
        """Buckets in order of name, and the token of the next page."""
        limit = checked_page_size(page_size)
        scope = ("buckets", tenant)
        after = self._tokens.read(scope, page_token)
        found = await self._catalog.list_buckets(tenant, after, limit + 1)
        more = len(found) > limit
        return found[:limit], self._tokens.made(scope, found[limit - 1].name) if more else ""

    async def list_objects(
        self, tenant: str, bucket: str, prefix: str, page_size: int, page_token: str
    ) -> tuple[list[Object], str]:
        """Objects in order of the bytes of their names, and the token of the next page."""
        checked_bucket("bucket", bucket)
        checked_text("prefix", prefix, 1_024, empty=True)
        limit = checked_page_size(page_size)
        scope = ("objects", tenant, bucket, prefix)
        found = await self._catalog.list_objects(
            tenant,
            bucket,
            after=self._tokens.read(scope, page_token),
            prefix=prefix,
            before=past_prefix(prefix),
            limit=limit + 1,
        )
        more = len(found) > limit
        last = found[limit - 1].place.name if more else ""
        return found[:limit], self._tokens.made(scope, last) if more else ""

    async def stat(self, tenant: str, place: Place) -> Object:
        """The object's description."""
        return (await self._found(tenant, _checked(place))).object

    async def put(self, tenant: str, header: Header, chunks: AsyncIterable[bytes]) -> Object:
        """Store an object. Raises what the proto says; then nothing of it is left.

        The bytes go through in chunks of at most 1 MiB; they are never together in memory.
        """
        content_type = self._check_header(header)
        before = await self._catalog.find(tenant, header.place)
        header.condition.check(header.place, before.object.etag if before else None)
        key, tally = new_key(), _Tally(header.bytes_max)
        await self._write(key, tally.counted(chunks), tally)
        draft = Draft(
            header.place,
            tally.size_bytes,
            content_type,
            tally.digest.digest(),
            header.metadata,
            blob=key,
        )
        return await self._name(tenant, draft, header.condition)

    async def get(
        self, tenant: str, place: Place, *, offset: int = 0, limit: int = 0, if_etag: str = ""
    ) -> Download:
        """Open an object for reading, from the offset on, `limit` bytes or all (0)."""
        _checked(place)
        for name, value in (("offset", offset), ("limit", limit)):
            if value < 0:
                raise InvalidField.of(name, "must not be negative")
        checked_text("if_etag", if_etag, ETAG_BYTES_MAX, empty=True)
        for _ in range(OPEN_ATTEMPTS):
            entry = await self._found(tenant, place)
            Condition(if_etag=if_etag).check(place, entry.object.etag)
            left = entry.object.size_bytes - offset
            if left < 0:
                raise InvalidField.of(
                    "offset", f"must be within the object's {entry.object.size_bytes} bytes"
                )
            size_bytes = min(left, limit) if limit else left
            try:
                chunks = await self._blobs.open(entry.blob, offset, size_bytes)
            except BlobMissing:
                continue
            return Download(entry.object, size_bytes, chunks)
        raise _lost()

    async def copy(self, tenant: str, source: Place, target: Place) -> Object:
        """Copy an object, replacing what has the target's name."""
        _checked_pair(source, target)
        for _ in range(OPEN_ATTEMPTS):
            entry = await self._found(tenant, source)
            key = new_key()
            try:
                await self._blobs.copy(entry.blob, key)
            except BlobMissing:
                continue
            was = entry.object
            draft = Draft(target, was.size_bytes, was.content_type, was.sha256, was.metadata, key)
            return await self._name(tenant, draft, Condition())
        raise _lost()

    async def move(self, tenant: str, source: Place, target: Place) -> Object:
        """Give an object another name, in one transaction, replacing what has it."""
        _checked_pair(source, target)
        moved, replaced = await self._catalog.move(tenant, source, target, secrets.token_hex(12))
        await self._discard([replaced] if replaced else [])
        return moved

    async def delete(
        self, tenant: str, bucket: str, names: Sequence[str]
    ) -> tuple[list[str], list[str]]:
        """The names of those that were deleted and of those that were not there, in order."""
        checked_bucket("bucket", bucket)
        if len(names) > DELETE_NAMES_MAX:
            raise InvalidField.of("names", f"must be at most {DELETE_NAMES_MAX:,}")
        asked = dict.fromkeys(
            checked_object_name(f"names[{index}]", name) for index, name in enumerate(names)
        )
        removed = await self._catalog.remove(tenant, bucket, list(asked))
        await self._discard(list(removed.values()))
        return [n for n in asked if n in removed], [n for n in asked if n not in removed]

    async def sweep(self, age_s: float) -> int:
        """Delete the bytes of at least this age that no object names; returns how many blobs."""
        swept = 0
        async for keys in self._blobs.old(age_s):
            unnamed = await self._catalog.unnamed(keys)
            await self._blobs.delete(unnamed)
            swept += len(unnamed)
        return swept

    def _check_header(self, header: Header) -> str:
        """Refuse what cannot be stored; returns the content type."""
        _checked(header.place)
        if not 0 <= header.bytes_max <= self._object_bytes_max:
            raise InvalidField.of("header.max_bytes", f"must be 0 to {self._object_bytes_max:,}")
        checked_pairs("metadata", header.metadata)
        checked_text("if_etag", header.condition.if_etag, ETAG_BYTES_MAX, empty=True)
        if header.condition.if_etag and header.condition.if_absent:
            raise InvalidField.of("if_absent", "must not be set together with if_etag")
        return checked_content_type("content_type", header.content_type)

    async def _found(self, tenant: str, place: Place) -> Entry:
        entry = await self._catalog.find(tenant, place)
        if entry is None:
            raise missing("object", f"{place.bucket}/{place.name}")
        return entry

    async def _write(self, key: str, chunks: AsyncIterator[bytes], tally: _Tally) -> None:
        try:
            await self._blobs.write(key, chunks)
        except BaseException as error:
            await self._discard([key])
            # What we refused, whatever became of it on its way through the blobs' library.
            if tally.fault is not None and isinstance(error, Exception):
                raise tally.fault from None
            raise

    async def _name(self, tenant: str, draft: Draft, condition: Condition) -> Object:
        """Commit the row; the bytes are deleted only where the row is certain not to name them."""
        try:
            stored, replaced = await self._catalog.put(tenant, draft, condition)
        except (NotFound, AlreadyExists, Conflict):
            await self._discard([draft.blob])
            raise
        await self._discard([replaced] if replaced else [])
        return stored

    async def _discard(self, keys: Sequence[str]) -> None:
        """Delete bytes that nothing names any more; where that fails, the sweep does it."""
        try:
            await self._blobs.delete(keys)
        except TollgateError:
            log.warning("bytes were left for the sweep", extra={"fields": {"blobs": len(keys)}})


class _Tally:
    """Counts and hashes an upload on its way through, and stops it at its declared maximum."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self.size_bytes = 0
        self.digest = hashlib.sha256()
        self.fault: TollgateError | None = None

    async def counted(self, chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
        try:
            async for chunk in chunks:
                self._count(chunk)
                if chunk:
                    yield chunk
        except TollgateError as error:
            self.fault = error
            raise

    def _count(self, chunk: bytes) -> None:
        if len(chunk) > WRITE_CHUNK_BYTES_MAX:
            raise InvalidField.of("data", "must be at most 1 MiB a message")
        self.size_bytes += len(chunk)
        if self.size_bytes > self._bytes_max:
            raise InvalidField.of(
                "header.max_bytes", f"more than the {self._bytes_max:,} declared came"
            )
        self.digest.update(chunk)


def new_key() -> str:
    """An opaque key of 32 hexadecimal digits that begins with the time, for the sweep's sake.

    A blob's own time will not do: a copy may share its file, and so its time, with the original.
    """
    return f"{time.time_ns():016x}{secrets.token_hex(8)}"


def key_age_s(key: str) -> float:
    """How long ago the key was made, in seconds; ValueError for what is no key of ours."""
    if len(key) != 32:
        raise ValueError("not a key")
    return (time.time_ns() - int(key[:16], 16)) / 1e9


def _checked(place: Place) -> Place:
    checked_bucket("bucket", place.bucket)
    checked_object_name("name", place.name)
    return place


def _checked_pair(source: Place, target: Place) -> None:
    _checked(source)
    checked_bucket("to_bucket", target.bucket)
    checked_object_name("to_name", target.name)
    if source == target:
        raise InvalidField.of("to_name", "must be another name than the object's own")


def _lost() -> ProviderUnavailable:
    log.error("an object's bytes are missing")
    return ProviderUnavailable("the object's bytes cannot be read")
