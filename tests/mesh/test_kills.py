"""Daemons die while documents are added: nothing is lost and nothing stays held."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from uuid import uuid4

import grpc
import pytest
from tollgate.corpus.v1 import corpus_pb2 as corpus
from tollgate.cost.v1 import cost_pb2 as cost

from cli.supervisor import ROOMS
from tests.mesh.conftest import Client, Mesh

pytestmark = pytest.mark.timeout(300)

DOCUMENTS = 6
READY_TIMEOUT_S = 120.0
AWAY = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


def document(number: int) -> bytes:
    """A few pages' worth of text that no other document has."""
    paragraphs = [
        f"## Part {part} of {number}\n\n" + f"Entry {number}-{part} {uuid4().hex} of the log. " * 20
        for part in range(6)
    ]
    return "\n\n".join(paragraphs).encode()


async def insist(make_call):  # type: ignore[no-untyped-def]  # any answer
    """Call until it is answered, as a client does that retries what may be retried."""
    for _ in range(200):
        try:
            return await make_call()
        except grpc.aio.AioRpcError as error:
            if error.code() not in AWAY:
                raise
            await asyncio.sleep(0.2)
    raise AssertionError("never answered")


@pytest.mark.parametrize("victim", ROOMS)
async def test_kill_9_loses_no_document(running: Mesh, client: Client, victim: str) -> None:
    """A daemon is killed while documents are added; all become READY and no hold stays open."""
    tenant = f"kill-{victim}"
    metadata = (("tollgate-tenant", tenant),)

    async def add(number: int) -> None:
        request = corpus.AddDocumentRequest(
            document_id=f"{victim}-{number}", file_name=f"{number}.md", content=document(number)
        )
        await insist(lambda: client.corpus.AddDocument(request, metadata=metadata, timeout=20))

    async def states() -> list[corpus.Document]:
        listed = await insist(
            lambda: client.corpus.ListDocuments(
                corpus.ListDocumentsRequest(), metadata=metadata, timeout=10
            )
        )
        return list(listed.documents)

    first = running.up.daemon_pid(victim)
    adding = asyncio.gather(*(add(number) for number in range(DOCUMENTS)))
    await asyncio.sleep(0.4)
    os.kill(first, signal.SIGKILL)
    await adding

    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        found = await states()
        if len(found) == DOCUMENTS and all(
            d.state in (corpus.DOCUMENT_STATE_READY, corpus.DOCUMENT_STATE_FAILED) for d in found
        ):
            break
        await asyncio.sleep(0.5)
    assert {d.state for d in found} == {corpus.DOCUMENT_STATE_READY}, found
    assert len(found) == DOCUMENTS
    assert running.up.daemon_pid(victim) != first

    # Whatever is still held has time left; nothing is held past its expiry.
    held = await insist(
        lambda: client.cost.ListHolds(
            cost.ListHoldsRequest(tenant=tenant, state=cost.HOLD_STATE_HELD),
            metadata=running.identity(tenant),
        )
    )
    late = [h for h in held.holds if h.expire_time.seconds < time.time() - 15]
    assert not late
