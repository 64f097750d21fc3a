"""Meters: what a call may use at most, and that no RPC goes without one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tollgate.embedder.v1 import embedder_pb2
from tollgate.parser.v1 import parser_pb2
from tollgate.storage.v1 import object_pb2

from chassis.errors import DocumentEncrypted, InvalidField, TollgateError
from chassis.tokens import count_tokens
from services.router.core.holds import UNITS_MAX, Units
from services.router.core.routes import Backend, Health, Kind, Model, Need, Route
from services.router.service.gate import labelled
from services.router.service.meters import FRONTED, METERS, Bound, Metered, in_range, metered

OPERATIONS = {rpc.operation: rpc for rpc in metered()}


def _backend(tokenizer: str = "minilm", tokens_max: int = 16) -> Backend:
    route = Route("embedder", "x.E", "p", Kind.REAL, "127.0.0.1:1")
    model = Model("m", tokenizer, tokens_max, 384, "space")
    return Backend(route, health=Health.SERVING, models={"m": model})


async def _bound(operation: str, request: Any, told: Any = None, **backend: Any) -> Bound:
    """The bound of a request, by a backend that answers the meter's question so."""

    async def ask(backend: Backend, method: str, request: Any, answer: Any) -> Any:
        assert isinstance(told, answer), "nothing else should be asked"
        return told

    rpc = _metered(operation)
    return await rpc.meter.bound(rpc.decode(request.SerializeToString()), _backend(**backend), ask)


def _metered(name: str) -> Metered:
    return next(rpc for rpc in OPERATIONS.values() if rpc.name == name)


@pytest.mark.parametrize(
    "operation",
    [f"{service.full_name}/{method.name}" for service in FRONTED for method in service.methods],
)
def test_every_rpc_of_a_fronted_service_is_metered(operation: str) -> None:
    """No RPC that the descriptors name goes without a meter."""
    assert operation in OPERATIONS
    rpc = OPERATIONS[operation]
    assert not (rpc.client_streaming and rpc.server_streaming), "the gate does not serve such"


def test_an_rpc_without_a_meter_is_not_served() -> None:
    """Taking a meter away takes the RPC away, and there is no meter for what is not there."""
    less = {name: meter for name, meter in METERS.items() if not name.endswith("/Embed")}
    assert "tollgate.embedder.v1.EmbedderService/Embed" not in {
        rpc.operation for rpc in metered(meters=less)
    }
    assert set(METERS) == set(OPERATIONS)


_text = st.text(max_size=200)


@settings(deadline=None, max_examples=60)
@given(st.lists(_text, max_size=4), st.sampled_from(["minilm", "words", "cl100k_base"]))
async def test_tokens_are_bounded_by_the_model_s_own_tokenizer(
    texts: list[str], tokenizer: str
) -> None:
    """The bound is what the tokenizer counts, less only what a text is cut by."""
    request = embedder_pb2.EmbedRequest(model="m", inputs=texts)
    whole = await _bound("Embed", request, tokenizer=tokenizer)
    counts = count_tokens(tokenizer, texts)
    assert whole == Bound(Units(tokens=sum(counts), requests=1), "m")
    request.truncate = True
    cut = await _bound("Embed", request, tokenizer=tokenizer, tokens_max=16)
    assert cut.units.tokens == sum(min(count, 16) for count in counts)


def test_an_embedding_needs_its_model_and_space() -> None:
    """A backend is chosen by the model and the space that the request names."""
    meter = _metered("Embed").meter
    request = embedder_pb2.EmbedRequest(model="m", space_id="s")
    assert meter.need(request) == Need("m", "s")
    with pytest.raises(InvalidField):
        meter.need(embedder_pb2.EmbedRequest())


async def test_pages_are_those_allowed_or_those_there_are() -> None:
    """Pages: max_pages where given, else the count, which is passed on as the new bound."""
    document = parser_pb2.Document(content=b"12345")
    allowed = await _bound("Parse", parser_pb2.ParseRequest(document=document, max_pages=7))
    assert allowed == Bound(Units(pages=7, bytes=5, requests=1))
    counted = await _bound(
        "Parse",
        parser_pb2.ParseRequest(document=document),
        parser_pb2.InspectResponse(page_count=3, size_bytes=5),
    )
    assert counted.units == Units(pages=3, bytes=5, requests=1)
    sent = parser_pb2.ParseRequest(document=document).SerializeToString() + counted.appended
    assert parser_pb2.ParseRequest.FromString(sent).max_pages == 3
    assert parser_pb2.ParseRequest.FromString(sent).document == document


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (parser_pb2.InspectResponse(encrypted=True), DocumentEncrypted),
        (parser_pb2.InspectResponse(), InvalidField),
    ],
)
async def test_a_document_without_a_page_count_needs_a_bound(
    found: parser_pb2.InspectResponse, kind: type[TollgateError]
) -> None:
    """What has no pages to count, or cannot be counted, is refused unless max_pages is given."""
    request = parser_pb2.ParseRequest(document=parser_pb2.Document(content=b"x"))
    with pytest.raises(kind):
        await _bound("Parse", request, found)


@given(st.integers(0, 1 << 50), st.integers(0, 1 << 50), st.integers(0, 1 << 50))
async def test_a_download_is_held_to_its_bound(size: int, offset: int, limit: int) -> None:
    """The bound covers every byte that the request, as forwarded, may bring back."""
    request = object_pb2.GetObjectRequest(bucket="b", name="n", offset=offset, limit=limit)
    stat = object_pb2.StatObjectResponse(object=object_pb2.Object(size_bytes=size))
    bound = await _bound("GetObject", request, stat)
    sent = object_pb2.GetObjectRequest.FromString(request.SerializeToString() + bound.appended)
    most = sent.limit or max(size - offset, 0)
    assert bound.units.bytes >= min(most, max(size - offset, 0))
    assert sent.offset == offset


def test_units_that_the_ledger_cannot_hold_are_out_of_range() -> None:
    """Negative and overflowing amounts are seen before they are sent anywhere."""
    assert in_range(Units(UNITS_MAX, 0, 1, 2))
    assert not in_range(Units(tokens=UNITS_MAX + 1))
    assert not in_range(Units(pages=-1))


@given(_text, _text)
def test_labels_are_appended_without_touching_the_body(body: str, label: str) -> None:
    """An answer keeps what it had, and gains provenance and receipt."""
    answer = embedder_pb2.EmbedResponse(model=body)
    provenance, receipt = embedder_pb2.EmbedResponse().provenance, answer.receipt
    provenance.provider = label
    whole = labelled(
        answer.SerializeToString(), provenance.SerializeToString(), receipt.SerializeToString()
    )
    decoded = embedder_pb2.EmbedResponse.FromString(whole)
    assert (decoded.model, decoded.provenance.provider) == (body, label)
    assert decoded.HasField("receipt")


@given(st.sampled_from(sorted(OPERATIONS)), st.binary(max_size=300))
async def test_no_bytes_whatever_break_a_meter(operation: str, data: bytes) -> None:
    """Hostile bytes are refused with an error of the family, or bounded within range."""
    rpc = OPERATIONS[operation]

    async def ask(backend: Backend, method: str, request: Any, answer: Any) -> Any:
        return answer()

    try:
        request = rpc.decode(data)
        need = rpc.meter.need(request)
        backend = _backend()
        backend.models = {need.model: Model(need.model, "words", 16, 384, "space")}
        bound = await rpc.meter.bound(request, backend, ask)
    except TollgateError:
        return
    assert in_range(bound.units)
