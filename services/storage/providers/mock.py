"""Storage in memory: the same rules and shapes, and nothing stays when the daemon ends."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime

import numpy as np

from chassis.errors import Conflict, ProviderUnavailable, Violation
from services.storage.core import (
    READ_CHUNK_BYTES_MAX,
    BlobMissing,
    Bucket,
    Condition,
    Draft,
    Entry,
    Object,
    Place,
    key_age_s,
    missing,
)
from services.storage.provider import Means, Provider
from services.storage.vectors import Document, Half, Hit, KeptVector, Query, Space, Vectors


def provide(means: Means) -> Provider:
    """Simulated objects and vectors."""
    blobs = MemoryBlobs(means.memory_bytes_max)
    return Provider(
        "mock",
        simulated=True,
        objects=means.objects(MemoryCatalog(), blobs),
        vectors=Vectors(MemoryVectors(means.memory_vectors_max)),
    )


class MemoryBlobs:
    """Bytes in memory, at most `bytes_max` of them together."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._bytes = 0
        self._kept: dict[str, bytes] = {}

    async def write(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        parts: list[bytes] = []
        try:
            async for chunk in chunks:
                self._take(len(chunk))
                parts.append(chunk)
        except BaseException:
            self._bytes -= sum(map(len, parts))
            raise
        self._kept[key] = b"".join(parts)

    async def open(self, key: str, offset: int, size_bytes: int) -> AsyncIterator[bytes]:
        if key not in self._kept:
            raise BlobMissing
        return _chunks(self._kept[key], offset, offset + size_bytes)

    async def copy(self, key: str, to_key: str) -> None:
        if key not in self._kept:
            raise BlobMissing
        self._take(len(self._kept[key]))
        self._kept[to_key] = self._kept[key]

    async def delete(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._bytes -= len(self._kept.pop(key, b""))

    async def old(self, age_s: float) -> AsyncIterator[list[str]]:
        yield [key for key in self._kept if key_age_s(key) >= age_s]

    def _take(self, size_bytes: int) -> None:
        if self._bytes + size_bytes > self._bytes_max:
            raise ProviderUnavailable("the mock's memory is full: delete objects or raise its size")
        self._bytes += size_bytes


async def _chunks(data: bytes, start: int, end: int) -> AsyncIterator[bytes]:
    for at in range(start, end, READ_CHUNK_BYTES_MAX):
        yield data[at : min(end, at + READ_CHUNK_BYTES_MAX)]


class _Shelf:
    """The objects of one bucket, and their names in order of their bytes."""

    def __init__(self, name: str) -> None:
        self.bucket = Bucket(name, datetime.now(UTC))
        self.entries: dict[str, Entry] = {}
        self.order: list[str] = []


class MemoryCatalog:
    """Objects by name, in memory. Python compares text by code point, as UTF-8 sorts."""

    def __init__(self) -> None:
        self._shelves: dict[tuple[str, str], _Shelf] = {}
        self._named: set[str] = set()

    async def create_bucket(self, tenant: str, name: str) -> Bucket:
        return self._shelves.setdefault((tenant, name), _Shelf(name)).bucket

    async def list_buckets(self, tenant: str, after: str, limit: int) -> list[Bucket]:
        found = [name for owner, name in self._shelves if owner == tenant and name > after]
        return [self._shelves[tenant, name].bucket for name in sorted(found)[:limit]]

    async def delete_bucket(self, tenant: str, name: str) -> None:
        if self._shelf(tenant, name).entries:
            raise Conflict(
                "the bucket is not empty", violations=[Violation(f"bucket/{name}", "not empty")]
            )
        del self._shelves[tenant, name]

    async def find(self, tenant: str, place: Place) -> Entry | None:
        return self._shelf(tenant, place.bucket).entries.get(place.name)

    async def list_objects(
        self, tenant: str, bucket: str, *, after: str, prefix: str, before: str | None, limit: int
    ) -> list[Object]:
        shelf = self._shelf(tenant, bucket)
        first = max(bisect_right(shelf.order, after), bisect_left(shelf.order, prefix))
        end = len(shelf.order) if before is None else bisect_left(shelf.order, before)
        return [shelf.entries[n].object for n in shelf.order[first : min(end, first + limit)]]

    async def put(
        self, tenant: str, draft: Draft, condition: Condition
    ) -> tuple[Object, str | None]:
        shelf, name = self._shelf(tenant, draft.place.bucket), draft.place.name
        before = shelf.entries.get(name)
        condition.check(draft.place, before.object.etag if before else None)
        stored = Object(
            draft.place,
            draft.size_bytes,
            draft.content_type,
            draft.sha256,
            dict(draft.metadata),
            draft.etag,
            datetime.now(UTC),
        )
        self._take_out(shelf, name)
        shelf.entries[name] = Entry(stored, draft.blob)
        insort(shelf.order, name)
        self._named.add(draft.blob)
        return stored, before.blob if before else None

    async def move(
        self, tenant: str, source: Place, target: Place, etag: str
    ) -> tuple[Object, str | None]:
        shelf = self._shelf(tenant, source.bucket)
        if source.name not in shelf.entries:
            raise missing("object", f"{source.bucket}/{source.name}")
        self._shelf(tenant, target.bucket)
        entry = self._take_out(shelf, source.name)
        assert entry is not None
        was = entry.object
        draft = Draft(
            target, was.size_bytes, was.content_type, was.sha256, was.metadata, entry.blob, etag
        )
        return await self.put(tenant, draft, Condition())

    async def remove(self, tenant: str, bucket: str, names: Sequence[str]) -> dict[str, str]:
        shelf = self._shelf(tenant, bucket)
        taken = {name: self._take_out(shelf, name) for name in names}
        return {name: entry.blob for name, entry in taken.items() if entry is not None}

    async def unnamed(self, keys: Sequence[str]) -> list[str]:
        return [key for key in keys if key not in self._named]

    def _shelf(self, tenant: str, bucket: str) -> _Shelf:
        shelf = self._shelves.get((tenant, bucket))
        if shelf is None:
            raise missing("bucket", bucket)
        return shelf

    def _take_out(self, shelf: _Shelf, name: str) -> Entry | None:
        entry = shelf.entries.pop(name, None)
        if entry is not None:
            del shelf.order[bisect_left(shelf.order, name)]
            self._named.discard(entry.blob)
        return entry


class MemoryVectors:
    """Vectors in memory, at most `vectors_max` of them together, searched exactly."""

    def __init__(self, vectors_max: int) -> None:
        self._vectors_max = vectors_max
        self._spaces: dict[str, Space] = {}
        # (tenant, space, document) -> revision -> id -> vector
        self._kept: dict[tuple[str, str, Document], dict[int, dict[str, KeptVector]]] = {}
        self._active: dict[tuple[str, str, Document], int] = {}

    async def space(self, space_id: str) -> Space | None:
        return self._spaces.get(space_id)

    async def ensure_space(self, space: Space) -> Space:
        return self._spaces.setdefault(space.id, space)

    async def upsert(
        self,
        tenant: str,
        space: Space,
        document: Document,
        revision: int,
        vectors: Sequence[KeptVector],
    ) -> bool:
        key = (tenant, space.id, document)
        if self._active.get(key, 0) > revision:
            return False
        kept = self._kept.get(key, {}).get(revision, {})
        added = sum(vector.id not in kept for vector in vectors)
        if self._count() + added > self._vectors_max:
            raise ProviderUnavailable("the mock's memory is full: delete vectors or raise its size")
        self._kept.setdefault(key, {})[revision] = kept
        kept.update((vector.id, vector) for vector in vectors)
        return True

    async def activate(
        self, tenant: str, space: Space, document: Document, revision: int
    ) -> int | None:
        key = (tenant, space.id, document)
        if self._active.get(key, 0) > revision:
            return None
        self._active[key] = revision
        return len(self._kept.get(key, {}).get(revision, {}))

    async def search(self, tenant: str, space: Space, query: Query) -> list[Hit]:
        near = query.values.astype(np.float32)
        near /= np.linalg.norm(near)
        hits = [
            Hit(vector.id, document.id, revision, _cosine(vector.values, near), vector.metadata)
            for (owner, space_id, document), revision in self._active.items()
            if (owner, space_id, document.collection) == (tenant, space.id, query.collection)
            for vector in self._kept.get((owner, space_id, document), {}).get(revision, {}).values()
            if query.filter.items() <= vector.metadata.items()
        ]
        return sorted(hits, key=lambda hit: (-hit.score, hit.document_id, hit.id))[: query.limit]

    async def lookup(self, tenant: str, space: Space, hashes: Sequence[bytes]) -> dict[bytes, Half]:
        asked = set(hashes)
        return {
            vector.text_sha256: vector.values
            for (owner, space_id, _), revisions in self._kept.items()
            if (owner, space_id) == (tenant, space.id)
            for vectors in revisions.values()
            for vector in vectors.values()
            if vector.text_sha256 in asked
        }

    async def delete(self, tenant: str, document: Document, revision: int) -> int:
        deleted = 0
        for key in [k for k in self._kept if k[0] == tenant and k[2] == document]:
            revisions = self._kept[key]
            for number in [revision] if revision else list(revisions):
                deleted += len(revisions.pop(number, {}))
            if not revisions:
                del self._kept[key]
        if revision == 0:
            for key in [k for k in self._active if k[0] == tenant and k[2] == document]:
                del self._active[key]
        return deleted

    def _count(self) -> int:
        return sum(len(v) for revisions in self._kept.values() for v in revisions.values())


def _cosine(values: Half, near: np.ndarray[tuple[int, ...], np.dtype[np.float32]]) -> float:
    given = values.astype(np.float32)
    return max(-1.0, min(1.0, float(given @ near / np.linalg.norm(given))))
