"""`tollgate search`: the passages nearest in meaning."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.padding import Padding
from rich.text import Text
from tollgate.corpus.v1 import corpus_pb2 as pb
from tollgate.corpus.v1 import corpus_pb2_grpc

from cli.caller import Caller
from cli.command import Misused, Session, command
from cli.documents import Collection, provenance
from cli.terminal import Terminal

app = typer.Typer()


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
    pairs = dict(_pair(given) for given in filters or [])
    async with session.router() as router:
        found = await searched(router, text, collection=collection, limit=limit, filters=pairs)
    session.terminal.answer(found)
    if not found.hits:
        session.terminal.say("nothing found")
    for number, hit in enumerate(found.hits, start=1):
        tell_hit(session.terminal, hit, number)


def _pair(text: str) -> tuple[str, str]:
    """`author=Ann` as a key and a value. Raises Misused."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise Misused(f"--filter {text}: give KEY=VALUE, such as --filter author=Ann")
    return key, value


async def searched(
    router: Caller,
    text: str,
    *,
    collection: str = "",
    limit: int,
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
