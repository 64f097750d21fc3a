"""Objects on this host's disk: bytes under opaque keys in a directory, names in PostgreSQL.

obstore's LocalStore writes to a file of its own (`key#1`) and renames it when it is whole.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import shutil
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from chassis.errors import ProviderUnavailable
from services.storage.core import READ_CHUNK_BYTES_MAX, BlobMissing, key_age_s
from services.storage.provider import Means, Provider

log = logging.getLogger(__name__)

# Together the most that an upload has in memory.
_PART_BYTES, _PARTS_AT_ONCE = 1 << 20, 4


def provide(means: Means) -> Provider:
    """Objects that stay."""
    blobs = FilesystemBlobs(means.objects_dir, free_bytes_min=means.free_bytes_min)
    objects = means.objects(means.catalog("filesystem"), blobs)
    return Provider("filesystem", simulated=False, objects=objects)


class FilesystemBlobs:
    """Bytes in files. Writing is refused where less than `free_bytes_min` is free."""

    def __init__(self, directory: Path, *, free_bytes_min: int) -> None:
        with _told("made"):
            directory.mkdir(parents=True, exist_ok=True)
            self._store = LocalStore(directory, mkdir=True)
        self._directory = directory
        self._free_bytes_min = free_bytes_min

    async def write(self, key: str, chunks: AsyncIterator[bytes]) -> None:
        path = _path(key)
        with _told("written"):
            if shutil.disk_usage(self._directory).free < self._free_bytes_min:
                raise OSError(errno.ENOSPC, "too little is free")
            await obstore.put_async(
                self._store,
                path,
                chunks,
                chunk_size=_PART_BYTES,
                max_concurrency=_PARTS_AT_ONCE,
            )
            await asyncio.to_thread(self._sync, path)

    async def open(self, key: str, offset: int, size_bytes: int) -> AsyncIterator[bytes]:
        if size_bytes == 0:
            return _nothing()
        options: obstore.GetOptions = {"range": (offset, offset + size_bytes)}
        with _told("read"):
            try:
                found = await obstore.get_async(self._store, _path(key), options=options)
            except FileNotFoundError:
                raise BlobMissing from None
        return _cut(found.stream(min_chunk_size=READ_CHUNK_BYTES_MAX))

    async def copy(self, key: str, to_key: str) -> None:
        with _told("copied"):
            try:
                await obstore.copy_async(self._store, _path(key), _path(to_key))
            except FileNotFoundError:
                raise BlobMissing from None
            await asyncio.to_thread(self._sync, _path(to_key))

    async def delete(self, keys: Sequence[str]) -> None:
        if keys:
            await asyncio.to_thread(self._unlink, [_path(key) for key in keys])

    async def old(self, age_s: float) -> AsyncIterator[list[str]]:
        with _told("listed"):
            for shard in await asyncio.to_thread(self._shards):
                keys = await asyncio.to_thread(self._old, shard, age_s)
                if keys:
                    yield keys

    def _sync(self, path: str) -> None:
        """See the bytes on the disk before a row names them: the file, then its directory entry."""
        file = self._directory / path
        for place in (file, file.parent, self._directory):
            descriptor = os.open(place, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def _unlink(self, paths: Sequence[str]) -> None:
        with _told("deleted"):
            for path in paths:
                (self._directory / path).unlink(missing_ok=True)

    def _shards(self) -> list[Path]:
        return sorted(entry for entry in self._directory.iterdir() if entry.is_dir())

    def _old(self, shard: Path, age_s: float) -> list[str]:
        """The old keys of a directory; what an upload that died left half-written is deleted here.

        Old is what neither its key nor its last write is younger than: an upload may take long.
        """
        keys: list[str] = []
        for file in shard.iterdir():
            key, mark, _ = file.name.partition("#")
            try:
                written_s = time.time() - file.stat().st_mtime
                if min(written_s, key_age_s(key)) < age_s:
                    continue
            except (ValueError, FileNotFoundError):
                continue  # Not ours, or gone meanwhile.
            if mark:
                file.unlink(missing_ok=True)
            else:
                keys.append(key)
        return keys


def _path(key: str) -> str:
    """Where a key is kept: in one of 256 directories, so that none grows too long."""
    return f"{key[-2:]}/{key}"


@contextmanager
def _told(done: str) -> Iterator[None]:
    """Faults of the disk, told as ours: without their texts, which name the host's paths."""
    try:
        yield
    except (BaseError, OSError) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        full = full or "No space left" in str(error) or "quota exceeded" in str(error)
        why = "the disk is full" if full else "the disk refused"
        log.error(
            "object bytes could not be %s", done, extra={"fields": {"why": why, "full": full}}
        )
        raise ProviderUnavailable(f"the object's bytes cannot be {done}: {why}") from None


async def _nothing() -> AsyncIterator[bytes]:
    nothing: tuple[bytes, ...] = ()
    for chunk in nothing:
        yield chunk


async def _cut(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    with _told("read"):
        async for chunk in chunks:
            view = memoryview(chunk)
            for start in range(0, len(view), READ_CHUNK_BYTES_MAX):
                yield bytes(view[start : start + READ_CHUNK_BYTES_MAX])
