"""`tollgate add|documents|search`: documents in, answers out."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text
from tollgate.corpus.v1 import corpus_pb2 as pb
from tollgate.corpus.v1 import corpus_pb2_grpc
from tollgate.router.v1 import answer_pb2
from tollgate.storage.v1 import object_pb2, object_pb2_grpc

from chassis.errors import NotFound, TollgateError
from cli.adding import BUCKET, Added, Adding, document_id, files_of
from cli.caller import Unreachable
from cli.command import Failed, Session, command, described, group
from cli.money import usd
from cli.terminal import Terminal, as_dict, local_time, lower, size, table

app = typer.Typer()
documents = group("The documents of a tenant: where each stands.")
app.add_typer(documents, name="documents")

_BARS_MAX = 14
_WIDE = 100
_COLOURS = {"ready": "green", "failed": "red", "deferred": "yellow"}

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


# --- add -------------------------------------------------------------------------------------


@command(app)
async def add(
    session: Session,
    paths: Annotated[
        list[Path], typer.Argument(metavar="FILES…", help="Files, and folders of them.")
    ],
    collection: Collection = "",
    watch: Annotated[
        bool, typer.Option(help="Follow every document until it can be searched.")
    ] = True,
) -> None:
    """Add documents, and follow them through their stages.

    The exit code is 1 where one failed. Ctrl-C stops the following only.
    """
    files = [Added(path, document_id(path)) for path in files_of(paths)]
    terminal = session.terminal
    try:
        async with session.router() as router:
            await followed(router, files, terminal, collection=collection, watch=watch)
    except (Unreachable, asyncio.CancelledError):
        _tell_what_goes_on(files, terminal)
        raise
    terminal.json(summary(files))
    tell_summary(files, terminal, watch=watch)
    if any(file.has_failed for file in files):
        raise Failed


async def followed(
    router: Any,
    files: Sequence[Added],
    terminal: Terminal,
    *,
    collection: str = "",
    watch: bool = True,
) -> None:
    """Add files with a bar each on a terminal, a line each elsewhere. Raises Unreachable."""
    if terminal.as_json:
        await Adding(router, collection=collection, watch=watch).all(files)
        return
    if not terminal.console.is_terminal:
        lines = _Lines(terminal)
        await Adding(router, collection=collection, watch=watch, changed=lines.changed).all(files)
        return
    with _progress(terminal, files) as progress:
        bars = _Bars(progress, files)
        await Adding(router, collection=collection, watch=watch, changed=bars.changed).all(files)


def _progress(terminal: Terminal, files: Sequence[Added]) -> Progress:
    # The names get what the rest leaves: bar, percent, stage, time.
    longest = max(len(file.path.name) for file in files)
    names = max(12, min(longest, terminal.width - 58, 40))
    return Progress(
        TextColumn(f"{{task.fields[file]:<{names}.{names}}}", style="bold"),
        BarColumn(bar_width=10 if terminal.width < 100 else 24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[stage]}"),
        TimeElapsedColumn(),
        console=terminal.console,
    )


class _Lines:
    """For logs and pipes: one line when a document has ended."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._told: set[str] = set()

    def changed(self, file: Added) -> None:
        if file.state in _COLOURS and file.document_id not in self._told:
            self._told.add(file.document_id)
            self._terminal.say(f"{escape(file.path.name)}: {escape(file.stage)}")


class _Bars:
    """A bar a document; where there are many, one for those under way and one for all."""

    def __init__(self, progress: Progress, files: Sequence[Added]) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._ended: set[str] = set()
        self._are_many = len(files) > _BARS_MAX
        if self._are_many:
            label = f"all {len(files)} documents"
            self._all = progress.add_task("", total=len(files), file=label, stage=_padded("", ""))
        else:
            for file in files:
                self._bar(file, start=False)

    def _bar(self, file: Added, *, start: bool = True) -> TaskID:
        if file.document_id not in self._tasks:
            self._tasks[file.document_id] = self._progress.add_task(
                "", total=100, start=start, file=file.path.name, stage=_padded(file.state, "")
            )
        return self._tasks[file.document_id]

    def changed(self, file: Added) -> None:
        if file.document_id in self._ended:
            return
        task = self._bar(file)
        self._progress.start_task(task)
        colour = _COLOURS.get(file.state, "")
        self._progress.update(task, completed=file.percent, stage=_padded(file.stage, colour))
        if file.state in _COLOURS:
            self._ended.add(file.document_id)
            self._progress.stop_task(task)
            if self._are_many:
                stage = _padded(file.stage, colour)
                self._progress.console.print(f"{escape(file.path.name)}: {stage.rstrip()}")
                self._progress.remove_task(task)
                self._progress.update(self._all, advance=1)


def _padded(stage: str, colour: str) -> str:
    """A stage as markup of always the same width, so that nothing moves."""
    words = escape(f"{stage:<30.30}")
    return f"[{colour}]{words}[/]" if colour else words


def summary(files: Sequence[Added]) -> dict[str, Any]:
    """What became of the files, for programs."""
    told = []
    for file in files:
        reason, message = file.why
        told.append(
            {
                "file": str(file.path),
                "document_id": file.document_id,
                "state": file.state,
                "reason": reason,
                "message": message,
                "document": as_dict(file.document),
            }
        )
    states = [file.state for file in files]
    counts = {name: states.count(name) for name in ("ready", "failed", "deferred")}
    return {"documents": told} | counts


def tell_summary(files: Sequence[Added], terminal: Terminal, *, watch: bool = True) -> None:
    """What became of the files, for people: counts, then each one that failed or waits, and why."""
    states = [file.state for file in files]
    parts = [
        f"[{colour}]{states.count(name)} {name}[/]"
        for name, colour in _COLOURS.items()
        if states.count(name)
    ]
    if going_on := sum(state not in _COLOURS for state in states):
        parts.append(f"{going_on} under way: `tollgate documents` shows them")
    terminal.say(", ".join(parts))
    rows = []
    for file in files:
        if file.state in ("failed", "deferred"):
            reason, message = file.why
            name = Text(file.path.name, style=_COLOURS[file.state])
            when = local_time(file.document.retry_time)
            rows.append([name, reason, message + (f"; tried again at {when}" if when else "")])
    if rows:
        terminal.show(table("document", "reason", "why", rows=rows))


def _tell_what_goes_on(files: Sequence[Added], terminal: Terminal) -> None:
    taken = sum(bool(f.document.state) and f.state not in _COLOURS for f in files)
    untaken = sum(not f.document.state and not f.reason for f in files)
    if taken:
        terminal.say(
            f"the mesh goes on with {taken} of the documents: `tollgate documents` shows them"
        )
    if untaken and untaken < len(files):
        terminal.say(f"{untaken} were not sent: add them again")


# --- documents -------------------------------------------------------------------------------


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
    request = pb.ListDocumentsRequest(collection=collection, page_size=min(limit, 1_000))
    if state is not None:
        request.state = pb.DocumentState.Value(f"DOCUMENT_STATE_{state.name}")
    found = pb.ListDocumentsResponse()
    async with session.router() as router:
        stub = corpus_pb2_grpc.CorpusServiceStub(router.channel)
        while len(found.documents) < limit:
            page = await router.unary(stub.ListDocuments, request)
            found.documents.extend(page.documents[: limit - len(found.documents)])
            request.page_token = page.next_page_token
            if not page.next_page_token:
                break
    session.terminal.answer(found)
    rows = [
        [
            d.id,
            d.collection,
            _state(d),
            f"{d.progress.pages_total:,}",
            f"{d.progress.chunks_total:,}",
            usd(d.charged_nanos_usd),
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
        ["charged", usd(d.charged_nanos_usd)],
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


def _state(document: pb.Document) -> Text:
    state = lower(pb.DocumentState.Name(document.state), "DOCUMENT_STATE_")
    reason = f": {document.reason}" if document.reason else ""
    return Text(f"{state}{reason}", style=_COLOURS.get(state, ""))


def provenance(of: answer_pb2.Provenance) -> str:
    """Where an answer came from, for people; what a mock made is marked."""
    words = " ".join(word for word in (of.provider, of.model) if word)
    marks = [word for word, is_so in (("simulated", of.simulated), ("cached", of.cached)) if is_so]
    return f"{words} ({', '.join(marks)})" if marks else words


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


async def _delete_upload(router: Any, name: str) -> None:
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


# --- search ----------------------------------------------------------------------------------


@command(app)
async def search(
    session: Session,
    text: Annotated[str, typer.Argument(help="What to be near to in meaning.")],
    collection: Collection = "",
    limit: Annotated[int, typer.Option(min=1, max=100, help="How many hits at the most.")] = 5,
    filters: Annotated[
        list[str] | None,
        typer.Option("--filter", metavar="KEY=VALUE", help="Only documents with this metadata."),
    ] = None,
) -> None:
    """Find the passages that are nearest in meaning to a text."""
    pairs = dict(pair.partition("=")[::2] for pair in filters or [])
    async with session.router() as router:
        found = await searched(router, text, collection=collection, limit=limit, filters=pairs)
    session.terminal.answer(found)
    if not found.hits:
        session.terminal.say("nothing found")
    for number, hit in enumerate(found.hits, start=1):
        tell_hit(session.terminal, hit, number)


async def searched(
    router: Any,
    text: str,
    *,
    collection: str = "",
    limit: int = 5,
    filters: dict[str, str] | None = None,
) -> pb.SearchResponse:
    """Ask the corpus. Raises the TollgateError that it meant."""
    stub = corpus_pb2_grpc.CorpusServiceStub(router.channel)
    request = pb.SearchRequest(query=text, collection=collection, limit=limit, filter=filters or {})
    found: pb.SearchResponse = await router.unary(stub.Search, request)
    return found


def tell_hit(terminal: Terminal, hit: pb.SearchHit, number: int, *, lines: int = 6) -> None:
    """A hit for people: where it is, how near, where its vector came from, and its words."""
    pages = f"page {hit.page}" + (f"-{hit.page_end}" if hit.page_end > hit.page else "")
    by = provenance(hit.provenance)
    style = "yellow" if hit.provenance.simulated else "dim"
    terminal.show(
        Text.assemble(
            (f"{number}. ", "dim"),
            (hit.file_name or hit.document_id, "bold"),
            f", {pages}, score ",
            (f"{hit.score:.3f}", "green"),
            (f"  {by}" if by else "", style),
        )
    )
    if hit.headings:
        terminal.show(Padding(Text(" > ".join(hit.headings), style="italic"), (0, 0, 0, 3)))
    words = Text(" ".join(_without_headings(hit).split()))
    words.truncate((terminal.width - 4) * lines, overflow="ellipsis")
    terminal.show(Padding(words, (0, 0, 1, 3)))


def _without_headings(hit: pb.SearchHit) -> str:
    """The words of a hit below the headings that it stands under, which are told apart."""
    lines = hit.text.strip().splitlines()
    while lines and (not lines[0].strip() or lines[0].lstrip("# ").strip() in hit.headings):
        lines.pop(0)
    return "\n".join(lines) or hit.text
