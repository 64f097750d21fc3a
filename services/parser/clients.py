"""The parser's documents: from the request itself, or from storage through the router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import cast

from tollgate.parser.v1 import parser_pb2 as parser_pb
from tollgate.storage.v1 import object_pb2 as pb
from tollgate.storage.v1 import object_pb2_grpc

from chassis.client import Peer
from chassis.errors import InvalidField, ProviderUnavailable
from services.parser.core import INLINE_BYTES_MAX, Document, Memory, too_large

Parts = AsyncGenerator[pb.GetObjectResponse, None]

HASH_ASIDE_BYTES = 1024 * 1024
"""Documents above this are hashed in a thread, so that other calls do not wait."""


class Documents:
    """Gets the documents of requests; all that are held at once fit in `memory`."""

    def __init__(self, peer: Peer, memory: Memory, bytes_max: int, timeout_s: float) -> None:
        self._peer = peer
        self._stub = object_pb2_grpc.ObjectServiceStub(peer.channel)
        self._memory = memory
        self._bytes_max = bytes_max
        self._timeout_s = timeout_s

    @asynccontextmanager
    async def fetch(self, wanted: parser_pb.Document) -> AsyncIterator[Document]:
        """The document that a request names.

        Raises InvalidField, DocumentTooLarge, Overloaded, and what storage raises.
        """
        match wanted.WhichOneof("source"):
            case "content":
                inline_max = min(INLINE_BYTES_MAX, self._bytes_max)
                if len(wanted.content) > inline_max:
                    raise too_large(len(wanted.content), inline_max, "store larger documents")
                with self._memory.hold(len(wanted.content)):
                    yield await _document(wanted.content, wanted.media_type, wanted.file_name)
            case "object":
                async with self._stored(wanted) as document:
                    yield document
            case _:
                raise InvalidField.of("document", "has content or names a stored object")

    @asynccontextmanager
    async def _stored(self, wanted: parser_pb.Document) -> AsyncIterator[Document]:
        for field in ("bucket", "name"):
            if not getattr(wanted.object, field):
                raise InvalidField.of(f"document.object.{field}", "is not empty")
        request = pb.GetObjectRequest(bucket=wanted.object.bucket, name=wanted.object.name)
        stream = self._peer.stream(self._stub.GetObject, request, timeout_s=self._timeout_s)
        async with aclosing(cast(Parts, aiter(stream))) as parts:
            found = (await anext(parts, pb.GetObjectResponse())).object
            if found.size_bytes > self._bytes_max:
                raise too_large(found.size_bytes, self._bytes_max, "split it")
            with self._memory.hold(found.size_bytes):
                yield await _document(
                    await _all(parts, found.size_bytes),
                    wanted.media_type or found.content_type,
                    wanted.file_name or wanted.object.name,
                )


async def _all(parts: Parts, size_bytes: int) -> bytes:
    """The bytes that follow an object's description: as many as it says, or ProviderUnavailable."""
    content = bytearray()
    async for part in parts:
        content += part.data
        if len(content) > size_bytes:
            break
    if len(content) != size_bytes:
        raise ProviderUnavailable("storage did not send the object whole")
    return bytes(content)


async def _document(content: bytes, media_type: str, file_name: str) -> Document:
    if len(content) <= HASH_ASIDE_BYTES:
        return Document.of(content, media_type, file_name)
    return await asyncio.to_thread(Document.of, content, media_type, file_name)
