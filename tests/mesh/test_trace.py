"""A document's whole way is one trace."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from uuid import uuid4

from tollgate.corpus.v1 import corpus_pb2 as corpus

from tests.mesh.conftest import Client, Mesh

TENANT = ("tollgate-tenant", "acme")
MARKDOWN = (
    b"# Tides\n\nThe harbour is shallow at low water.\n\n# Pilots\n\nThe master pays the pilot.\n"
)


def spans_of(mesh: Mesh, request_id: str) -> list[dict[str, Any]]:
    """Every finished span of the request's trace, from the files of all daemons."""
    spans = [
        json.loads(line)
        for file in (mesh.state_dir / "traces").glob("*.jsonl")
        for line in file.read_text().splitlines()
    ]
    traces = {
        s["trace_id"] for s in spans if s["attributes"].get("tollgate.request_id") == request_id
    }
    return [span for span in spans if span["trace_id"] in traces]


async def until_written(mesh: Mesh, request_id: str) -> list[dict[str, Any]]:
    """The spans once no more are written."""
    seen: list[dict[str, Any]] = []
    for _ in range(40):
        await asyncio.sleep(0.75)
        now = spans_of(mesh, request_id)
        if now and len(now) == len(seen):
            break
        seen = now
    return seen


async def test_one_document_is_one_trace(running: Mesh, client: Client) -> None:
    """Router, cost, parser, embedder, storage and corpus are in one trace, with parents right."""
    request_id = f"trace-{uuid4().hex}"
    await client.corpus.AddDocument(
        corpus.AddDocumentRequest(document_id=uuid4().hex, file_name="a.md", content=MARKDOWN),
        metadata=(TENANT, ("tollgate-request-id", request_id)),
    )
    documents = client.corpus.ListDocuments
    for _ in range(120):
        listed = await documents(corpus.ListDocumentsRequest(), metadata=(TENANT,))
        ours = [d for d in listed.documents if d.request_id == request_id]
        if ours[0].state == corpus.DOCUMENT_STATE_READY:
            break
        await asyncio.sleep(0.25)
    assert ours[0].state == corpus.DOCUMENT_STATE_READY, ours[0]

    spans = await until_written(running, request_id)
    assert {span["service"] for span in spans} == {
        *("router", "cost", "parser", "embedder", "storage", "corpus")
    }
    assert len({span["trace_id"] for span in spans}) == 1
    by_id = {span["span_id"]: span for span in spans}
    roots = [span for span in spans if not span["parent_id"]]
    assert [(root["service"], root["name"]) for root in roots] == [
        ("router", "tollgate.corpus.v1.CorpusService/AddDocument")
    ]
    orphans = [s for s in spans if s["parent_id"] and s["parent_id"] not in by_id]
    assert not orphans
    # What a daemon behind the router serves was asked of it by the router.
    for service in ("parser", "embedder", "storage"):
        served = [s for s in spans if s["service"] == service and s["kind"] == "server"]
        assert served
        assert {by_id[s["parent_id"]]["service"] for s in served} == {"router"}
    # And what the router serves of those was asked by the corpus, or by the parser for the bytes.
    asked = [
        s for s in spans if s["service"] == "router" and s["kind"] == "server" and s["parent_id"]
    ]
    assert {by_id[s["parent_id"]]["service"] for s in asked} <= {"corpus", "parser"}
