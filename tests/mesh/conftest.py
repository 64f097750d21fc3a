"""One mesh of real processes for the tests of a file, and a client that knows no chassis."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from tollgate.corpus.v1 import corpus_pb2_grpc
from tollgate.cost.v1 import cost_pb2_grpc
from tollgate.embedder.v1 import embedder_pb2_grpc
from tollgate.parser.v1 import parser_pb2_grpc
from tollgate.router.v1 import router_pb2_grpc
from tollgate.storage.v1 import object_pb2_grpc, vector_pb2_grpc

from chassis.call import IDENTITY, Call
from chassis.identity import sign
from tests.running import Up, environment_of


@dataclass
class Mesh:
    """A running mesh: its processes, its state and where it is."""

    up: Up
    state_dir: Path

    @property
    def router(self) -> str:
        return self.up.environment["TOLLGATE_ROUTER_ADDRESS"]

    @property
    def cost(self) -> str:
        return self.up.environment["TOLLGATE_COST_ADDRESS"]

    def identity(self, tenant: str) -> tuple[tuple[str, str], ...]:
        """What a daemon behind the router asks for."""
        secret = (self.state_dir / "mesh.secret").read_bytes().strip()
        return ((IDENTITY, sign(Call(tenant, request_id="test"), secret)),)


class Client:
    """Every service of the mesh, as stubs on the router; and the ledger, as operators have it."""

    def __init__(self, router: grpc.aio.Channel, cost: grpc.aio.Channel) -> None:
        self.parser = parser_pb2_grpc.ParserServiceStub(router)
        self.embedder = embedder_pb2_grpc.EmbedderServiceStub(router)
        self.objects = object_pb2_grpc.ObjectServiceStub(router)
        self.vectors = vector_pb2_grpc.VectorServiceStub(router)
        self.corpus = corpus_pb2_grpc.CorpusServiceStub(router)
        self.router = router_pb2_grpc.RouterServiceStub(router)
        self.cost = cost_pb2_grpc.CostServiceStub(cost)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """A mesh for the tests of one file. Holds expire soon, so that a test can see it happen."""
    state_dir = tmp_path_factory.mktemp("mesh")
    up = Up.start(environment_of(state_dir))
    try:
        up.until("serving")
        yield Mesh(up, state_dir)
    finally:
        up.end()


@pytest_asyncio.fixture
async def client(running: Mesh) -> AsyncIterator[Client]:
    """A client of the running mesh."""
    async with (
        grpc.aio.insecure_channel(running.router) as router,
        grpc.aio.insecure_channel(running.cost) as cost,
    ):
        yield Client(router, cost)
