"""`tollgate documents`: where each stands."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.text import Text
from tollgate.corpus.v1 import corpus_pb2 as pb
from tollgate.corpus.v1 import corpus_pb2_grpc
from tollgate.router.v1 import answer_pb2
from tollgate.storage.v1 import object_pb2, object_pb2_grpc

from chassis.errors import NotFound, TollgateError
from cli.caller import PAGE_SIZE, Caller
from cli.command import Failed, Session, command, described, group
from cli.intake import BUCKET, is_simulated
from cli.money import usd
from cli.terminal import local_time, lower, size, table

app = typer.Typer()
documents = group("The documents of a tenant: where each stands.")
app.add_typer(documents, name="documents")

STATE_COLOURS = {"ready": "green", "failed": "red", "deferred": "yellow"}

_WIDE = 100

Collection = Annotated[str, typer.Option(help="The collection; `default` when absent.")]


class State(StrEnum):
    """Where a document stands."""

    STORED = "stored"
    PARSING = "parsing"
    CHUNKING = "chunking"
    EMBEDDING = "embedding"
    INDEXING = "indexing"
    READY = "ready"
    FAILED = "failed"
    DEFERRED = "deferred"


@command(documents, "show")
async def show(
    session: Session,
    document_id_: Annotated[
        str | None, typer.Argument(metavar="[ID]", help="Only this document.", show_default=False)
    ] = None,
    collection: Collection = "",
    state: Annotated[State | None, typer.Option(help="Only documents in this state.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=100_000, help="How many at the most.")] = 100,
) -> None:
    """List documents, the newest first, or show one: `tollgate documents [ID]`."""
    if document_id_ is not None:
        await _show_one(session, document_id_, collection)
        return
    request = pb.ListDocumentsRequest(collection=collection, page_size=min(limit, PAGE_SIZE))
    if state is not None:
        request.state = pb.DocumentState.Value(f"DOCUMENT_STATE_{state.name}")
    found = pb.ListDocumentsResponse()
    async with session.router() as router:
        stub = corpus_pb2_grpc.CorpusServiceStub(router.channel)
        async for page in router.pages(stub.ListDocuments, request):
            found.documents.extend(page.documents[: limit - len(found.documents)])
            if len(found.documents) >= limit:
                break
    session.terminal.answer(found)
    rows = [
        [
            d.id,
            d.collection,
            _state(d),
            f"{d.progress.pages_total:,}",
            f"{d.progress.chunks_total:,}",
            charged(d),
            size(d.size_bytes),
            local_time(d.create_time),
        ]
        for d in found.documents
    ]
    columns = ["document", "collection", "=state", ">pages", ">chunks", ">charged"]
    if session.terminal.width >= _WIDE:
        columns += [">size", "=added"]
    shown = [row[: len(columns)] for row in rows]
    session.terminal.show(
        table(*columns, rows=shown) if rows else "no documents: `tollgate add FILES…` adds some"
    )


async def _show_one(session: Session, document_id_: str, collection: str) -> None:
    async with session.router() as router:
        stub = corpus_pb2_grpc.CorpusServiceStub(router.channel)
        request = pb.GetDocumentRequest(collection=collection, document_id=document_id_)
        found = await router.unary(stub.GetDocument, request)
    session.terminal.answer(found)
    d = found.document
    rows: list[list[Any]] = [
        ["id", d.id],
        ["collection", d.collection],
        ["file", d.file_name],
        ["media type", d.media_type],
        ["size", size(d.size_bytes)],
        ["sha256", d.sha256.hex()],
        ["revision", str(d.revision)],
        ["state", _state(d)],
        ["why", d.message],
        ["tried again at", local_time(d.retry_time)],
        ["pages", f"{d.progress.pages_done} of {d.progress.pages_total}"],
        ["chunks", f"{d.progress.chunks_done} of {d.progress.chunks_total}"],
        ["charged", charged(d)],
        ["parsed by", provenance(d.parsed_by)],
        ["embedded by", provenance(d.embedded_by)],
        ["request id", d.request_id],
        ["added", local_time(d.create_time)],
        ["changed", local_time(d.update_time)],
        *([key, value] for key, value in sorted(d.metadata.items())),
    ]
    made = table("", "", rows=[[name, value] for name, value in rows if str(value)])
    made.show_header = False
    session.terminal.show(made)


@command(documents, "delete")
async def delete(
    session: Session,
    document_id_: Annotated[str, typer.Argument(metavar="ID", help="The document's id.")],
    collection: Collection = "",
) -> None:
    """Delete a document with its chunks and vectors."""
    async with session.router() as router:
        stub = corpus_pb2_grpc.CorpusServiceStub(router.channel)
        request = pb.DeleteDocumentRequest(collection=collection, document_id=document_id_)
        deleted = await router.unary(stub.DeleteDocument, request)
        await _delete_upload(router, document_id_)
    session.terminal.answer(deleted)
    session.terminal.say(
        f"{escape(document_id_)} is deleted, with {deleted.chunks:,} chunks and "
        f"{deleted.vectors:,} vectors"
    )


async def _delete_upload(router: Caller, name: str) -> None:
    """Delete the object that `add` stored for a large document, where there is one."""
    stub = object_pb2_grpc.ObjectServiceStub(router.channel)
    try:
        await router.unary(
            stub.DeleteObjects, object_pb2.DeleteObjectsRequest(bucket=BUCKET, names=[name])
        )
    except NotFound:
        pass
    except TollgateError as error:
        raise Failed(
            f"the document is deleted, its upload is not: {described(error)}", reason=error.reason
        ) from None


def _state(document: pb.Document) -> Text:
    state = lower(pb.DocumentState.Name(document.state), "DOCUMENT_STATE_")
    reason = f": {document.reason}" if document.reason else ""
    how = " (simulated)" if is_simulated(document) else ""
    return Text(f"{state}{how}{reason}", style=STATE_COLOURS.get(state, ""))


def charged(document: pb.Document) -> str:
    """What a document cost; what a mock did of it is at a notional price, and never spend."""
    amount = usd(document.charged_nanos_usd)
    return f"{amount} simulated" if is_simulated(document) else amount


def provenance(of: answer_pb2.Provenance) -> str:
    """Where an answer came from, for people; what a mock made is marked."""
    words = " ".join(word for word in (of.provider, of.model) if word)
    marks = [word for word, is_so in (("simulated", of.simulated), ("cached", of.cached)) if is_so]
    return f"{words} ({', '.join(marks)})" if marks else words
