"""The parser as its callers have it: a real daemon on a socket, its workers seen from outside."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from tollgate.cost.v1 import usage_pb2
from tollgate.parser.v1 import parser_pb2 as pb
from tollgate.parser.v1 import parser_pb2_grpc
from tollgate.router.v1 import answer_pb2

from chassis.call import PROVENANCE, USAGE, Call
from chassis.client import Peer
from chassis.settings import MeshSettings
from services.parser.main import Settings, wire


@dataclass
class Answer:
    """All that came of a parse."""

    events: list[pb.ParseResponse] = field(default_factory=list)
    trailers: Mapping[str, str | bytes] = field(default_factory=dict)

    @property
    def kinds(self) -> list[str]:
        """The events' kinds, in order."""
        return [event.WhichOneof("event") or "" for event in self.events]

    @property
    def pages(self) -> list[pb.Page]:
        """The pages, in order."""
        return [event.page for event in self.events if event.HasField("page")]

    @property
    def usage(self) -> usage_pb2.Usage:
        """What the daemon says that it used."""
        return usage_pb2.Usage.FromString(_bytes(self.trailers[USAGE]))

    @property
    def provenance(self) -> answer_pb2.Provenance:
        """Where the daemon says that it comes from."""
        return answer_pb2.Provenance.FromString(_bytes(self.trailers[PROVENANCE]))


def _bytes(value: str | bytes) -> bytes:
    assert isinstance(value, bytes)
    return value


class Caller:
    """A client of one parser daemon."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.stub = parser_pb2_grpc.ParserServiceStub(peer.channel)

    async def parse(
        self,
        content: bytes,
        media_type: str = "",
        file_name: str = "",
        *,
        max_pages: int = 0,
        provider: str = "",
        timeout_s: float = 30.0,
    ) -> Answer:
        """Parse inline bytes to the end. Raises the daemon's typed error."""
        document = pb.Document(content=content, media_type=media_type, file_name=file_name)
        return await self.parse_document(document, max_pages, provider, timeout_s)

    async def parse_document(
        self, document: pb.Document, max_pages: int = 0, provider: str = "", timeout_s: float = 30.0
    ) -> Answer:
        """Parse any document to the end."""
        request = pb.ParseRequest(document=document, max_pages=max_pages)
        stream = self.peer.stream(self.stub.Parse, request, timeout_s=timeout_s, provider=provider)
        answer = Answer([event async for event in stream])
        answer.trailers = stream.trailers
        return answer

    async def inspect(
        self, content: bytes, media_type: str = "", file_name: str = "", *, provider: str = ""
    ) -> pb.InspectResponse:
        """Inspect inline bytes."""
        document = pb.Document(content=content, media_type=media_type, file_name=file_name)
        request = pb.InspectRequest(document=document)
        return await self.peer.unary(self.stub.Inspect, request, timeout_s=30, provider=provider)


StartParser = Callable[..., AbstractAsyncContextManager[Caller]]


@pytest.fixture
def start_parser(
    mesh_without_database: MeshSettings, as_tenant: Call, tmp_path: Path
) -> StartParser:
    """Starts a parser with the given settings, on a unix socket of this test's own."""

    @asynccontextmanager
    async def start(**settings: object) -> AsyncIterator[Caller]:
        mesh = mesh_without_database
        given = {"listen": f"unix:{tmp_path}/parser.sock", "local_workers": 1, **settings}
        async with wire(mesh, Settings.model_validate(given)) as daemon:
            peer = Peer(daemon.address, mesh)
            try:
                yield Caller(peer)
            finally:
                await peer.close()

    return start


@pytest.fixture
async def parser(start_parser: StartParser) -> AsyncIterator[Caller]:
    """A parser of one worker."""
    async with start_parser() as caller:
        yield caller


def worker_pids(daemon: int | None = None) -> list[int]:
    """A daemon's sandbox workers, as the system lists them; those of this test by default."""
    children = Path(f"/proc/{daemon or os.getpid()}/task").glob("*/children")
    pids = [int(pid) for listed in children for pid in listed.read_text().split()]
    return sorted(pid for pid in pids if _is_worker(pid))


async def gone(pid: int) -> None:
    """Wait until that process has ended, at most ten seconds."""
    async with asyncio.timeout(10):
        while runs(pid):  # another process has no event to wait for
            await asyncio.sleep(0.01)


def runs(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def _is_worker(pid: int) -> bool:
    try:
        return b"services.parser.sandbox.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
