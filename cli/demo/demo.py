"""`tollgate demo`: a mesh of its own, real documents, searches, the bill and the trace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import typer
from rich.markup import escape
from rich.rule import Rule
from tollgate.corpus.v1 import corpus_pb2 as pb
from tollgate.cost.v1 import cost_pb2

from chassis.errors import TollgateError
from chassis.settings import MeshSettings
from cli import trace
from cli.add import followed, summary, tell_summary
from cli.caller import Caller
from cli.command import Failed, Session, command, described
from cli.holds import each_hold, hold_table
from cli.intake import Added, files_of
from cli.money import usd
from cli.ports import free_ports
from cli.search import searched, tell_hit
from cli.spans import Span, of_request, read_spans
from cli.supervisor import ROOMS, Interrupted, Supervisor, UpError
from cli.terminal import INTERRUPTED, Terminal, as_dict
from cli.up import Told

app = typer.Typer()

SAMPLES = Path(__file__).with_name("documents")
PRICES = Path(__file__).with_name("prices.json")
_PROBE = "What is this document about?"
_SETTLED_TIMEOUT_S = 20.0
_TRACE_TIMEOUT_S = 5.0
_HITS = 2
_DOCUMENTS_APART_MAX = 4
# A question is a line of words; the corpus takes no more than 8 KiB.
_QUESTION_WORDS_MAX = 20
_QUESTION_CHARACTERS_MAX = 200


@dataclass(frozen=True)
class Question:
    """A search, and where its answer is known to be."""

    text: str
    file_name: str
    page: int


# None of the words that matter in these is in the passage that answers them.
QUESTIONS = (
    Question("When is it too windy to lift containers?", "harbour-handbook.pdf", 4),
    Question("I am stuck in a swamp. How do I escape?", "field-guide.html", 1),
)


@command(app)
async def demo(
    session: Session,
    paths: Annotated[
        list[Path] | None,
        typer.Argument(metavar="DOCS", help="Files and folders; three samples when absent."),
    ] = None,
) -> None:
    """Show everything once: documents in, two searches, what it cost, and the trace.

    Runs a mesh of its own on free ports, beside any that is running, and stops it at the end. Its
    state is kept in demo/ of the state directory, which makes the next run quick; its database is
    new every time.
    """
    began = time.monotonic()
    terminal = session.terminal
    files = files_of(paths or [SAMPLES])
    mine = session.with_mesh(_mesh(session.mesh))
    supervisor = Supervisor(
        mine.mesh,
        (told := Told(terminal, with_events=False)).reporter(),
        environment=_ENVIRONMENT | _listening(mine.mesh),
        prepare=lambda url: _fresh(url, mine.mesh.state_dir),
    )
    show = Show(mine, files, () if paths else QUESTIONS)
    try:
        terminal.show(Rule("a mesh of six daemons and a database", align="left"))
        with told.starting():
            context = supervisor.running()
            await context.__aenter__()
        try:
            terminal.say(f"all serving after {time.monotonic() - began:.1f} s\n")
            await supervisor.during(show.all())
        finally:
            await context.__aexit__(None, None, None)
    except UpError as error:
        raise Failed(str(error), reason="cannot start") from None
    except Interrupted:
        terminal.say("stopped; nothing is left running")
        raise typer.Exit(INTERRUPTED) from None
    terminal.json(show.told)
    terminal.say(
        f"\nEverything is stopped again, after {time.monotonic() - began:.1f} s in all. "
        "`make up` starts a mesh that stays."
    )
    if show.missed:
        raise Failed(f"a search did not find its page: {'; '.join(show.missed)}")
    if show.refused:
        raise Failed("a search was refused")


_ENVIRONMENT = {
    # The trace is read from the files of the state directory, whole.
    "TOLLGATE_OTLP_ENDPOINT": "",
    "TOLLGATE_TRACE_SAMPLE_RATIO": "1",
    "TOLLGATE_COST_PRICES_FILE": str(PRICES),
    "TOLLGATE_ROUTER_AUTHENTICATION": "none",
}


def _listening(mesh: MeshSettings) -> dict[str, str]:
    """Each daemon on its free port, whatever the environment says of a mesh that stays."""
    return {f"TOLLGATE_{room.upper()}_LISTEN": getattr(mesh, f"{room}_address") for room in ROOMS}


def _mesh(mesh: MeshSettings) -> MeshSettings:
    """The same settings with a state directory, a database and ports of the demo's own."""
    changed: dict[str, Any] = {"state_dir": mesh.state_dir / "demo", "database_url": None}
    for room, port in zip(ROOMS, free_ports(len(ROOMS)), strict=True):
        changed[f"{room}_address"] = f"127.0.0.1:{port}"
    return MeshSettings(**(mesh.model_dump() | changed))


async def _fresh(url: str, state_dir: Path) -> str:
    """A new database on the kept server, without what the runs before left. Its url."""
    name = f"demo_{uuid4().hex[:12]}"
    connection = await asyncpg.connect(url)
    try:
        left = await connection.fetch("SELECT datname FROM pg_database WHERE datname LIKE 'demo_%'")
        for (old,) in left:
            await connection.execute(f'DROP DATABASE "{old}" WITH (FORCE)')
        await connection.execute(f"CREATE DATABASE {name}")
    finally:
        await connection.close()
    await asyncio.to_thread(_forget, state_dir)
    return urlunsplit(urlsplit(url)._replace(path=f"/{name}"))


def _forget(state_dir: Path) -> None:
    """Remove the objects and traces of the runs before: their database is gone."""
    for kept in ("objects", "traces"):
        for file in (state_dir / kept).rglob("*"):
            if file.is_file():
                file.unlink(missing_ok=True)


class Show:
    """What is shown while the mesh runs. `told` is the same for programs."""

    def __init__(self, session: Session, files: list[Added], questions: Sequence[Question]) -> None:
        self._session, self._files, self._questions = session, files, list(questions)
        self._terminal: Terminal = session.terminal
        self.told: dict[str, Any] = {}
        self.missed: list[str] = []
        self.refused = 0

    async def all(self) -> None:
        """Documents, searches, holds, trace."""
        async with self._session.router() as router, self._session.ledger() as ledger:
            await self._add(router)
            if self._ready:
                await self._search(router)
            await self._bill(ledger)
            await self._trace()
        if not self._ready:
            raise Failed("none of the documents could be made searchable")

    @property
    def _ready(self) -> list[Added]:
        return [file for file in self._files if file.state == "ready"]

    def _heading(self, text: str) -> None:
        self._terminal.say()
        self._terminal.show(Rule(text, align="left"))

    async def _add(self, router: Caller) -> None:
        self._terminal.show(Rule("documents in", align="left"))
        await followed(router, self._files, self._terminal)
        self.told |= summary(self._files)
        tell_summary(self._files, self._terminal)

    async def _search(self, router: Caller) -> None:
        self._heading("searches, by meaning")
        self.told["searches"] = []
        try:
            questions = self._questions or await self._derived(router)
        except TollgateError as error:
            self._refused(_PROBE, error)
            return
        for question in questions:
            try:
                found = await searched(router, question.text, limit=_HITS)
            except TollgateError as error:
                self._refused(question.text, error)
            else:
                self._found(question, found)

    def _found(self, question: Question, found: pb.SearchResponse) -> None:
        best = found.hits[0] if found.hits else pb.SearchHit()
        is_right = _answers(best, question)
        self.told["searches"].append({"query": question.text, "found": is_right, **as_dict(found)})
        self._terminal.say(f'[bold]"{escape(question.text)}"[/]')
        for number, hit in enumerate(found.hits, start=1):
            tell_hit(self._terminal, hit, number, lines=3)
        if self._questions and not is_right:
            self.missed.append(f"{question.file_name} page {question.page}")

    def _refused(self, text: str, error: TollgateError) -> None:
        """Tell of a search that was not answered; what comes after it is shown all the same."""
        why = f"{error.reason}: {described(error)}"
        self.refused += 1
        self.told["searches"].append({"query": text, "found": False, "refused": why})
        self._terminal.say(f'[bold]"{escape(_short(text))}"[/] [red]was refused: {escape(why)}[/]')

    async def _derived(self, router: Caller) -> list[Question]:
        """Two questions about foreign documents, from the headings or first words of passages."""
        probe = await searched(router, _PROBE, limit=50)
        chosen: list[Question] = []
        seen: set[Any] = set()
        several = len({hit.document_id for hit in probe.hits}) > 1
        for hit in probe.hits:
            place = hit.document_id if several else (hit.document_id, hit.page)
            text = question_of(hit)
            if text and place not in seen:
                seen.add(place)
                chosen.append(Question(text, hit.file_name, hit.page))
        return chosen[:2]

    async def _bill(self, ledger: Caller) -> None:
        self._heading("what each step held, and was charged")
        holds = await self._settled(ledger)
        self.told["holds"] = [as_dict(hold) for hold in holds]
        self._terminal.say(
            "Local work is free. So that the ledger has something to show, the demo has a rate "
            "card of its own: $0.10 a million tokens, $50 a million pages.",
            style="dim",
        )
        self._terminal.show(hold_table(self._grouped(holds), with_time=False))
        genuine = [hold for hold in holds if not hold.scope.simulated]
        held = sum(hold.held_nanos_usd for hold in genuine)
        charged = sum(hold.charged_nanos_usd for hold in genuine)
        self._terminal.say(
            f"{len(holds)} holds for {len(self._files)} documents: held {usd(held)}, "
            f"charged [bold]{usd(charged)}[/]"
        )
        if simulated := len(holds) - len(genuine):
            self._terminal.say(f"{simulated} of them simulated, which is never counted as spend")

    def _grouped(self, holds: list[cost_pb2.Hold]) -> dict[str, list[cost_pb2.Hold]]:
        """The holds by document, a step's as one; of many documents all as one."""
        if len(self._files) > _DOCUMENTS_APART_MAX:
            return {f"{len(self._files)} documents": summed(holds)}
        return {
            file.name: summed(h for h in holds if h.request_id == file.document.request_id)
            for file in self._files
            if file.document.request_id
        }

    async def _settled(self, ledger: Caller) -> list[cost_pb2.Hold]:
        """The holds of the documents' requests, once none is open any more."""
        deadline = time.monotonic() + _SETTLED_TIMEOUT_S
        while True:
            holds: list[cost_pb2.Hold] = []
            for request_id in dict.fromkeys(f.document.request_id for f in self._files):
                if request_id:
                    tenant = self._session.tenant
                    of_one = [hold async for hold in each_hold(ledger, tenant, request_id)]
                    holds += reversed(of_one)
            is_open = any(hold.state == cost_pb2.HOLD_STATE_HELD for hold in holds)
            if not is_open or time.monotonic() > deadline:
                return holds
            await asyncio.sleep(0.2)

    async def _trace(self) -> None:
        subject = max(
            self._ready or self._files, key=lambda f: f.document.progress.pages_total, default=None
        )
        if subject is None or not subject.document.request_id:
            return
        self._heading(f"the trace of {escape(subject.name)}")
        spans = await self._whole_trace(subject.document.request_id)
        self.told["trace"] = trace.as_json(spans)
        if spans:
            self._terminal.show(trace.drawing(spans, self._terminal.width))

    async def _whole_trace(self, request_id: str) -> list[Span]:
        """The spans of a request, once every daemon has written its own."""
        deadline = time.monotonic() + _TRACE_TIMEOUT_S
        before = -1
        while True:
            every = await asyncio.to_thread(lambda: list(read_spans(self._session.mesh.state_dir)))
            spans = of_request(every, request_id)
            is_whole = {span.service for span in spans} >= set(ROOMS) and len(spans) == before
            if is_whole or time.monotonic() > deadline:
                return spans
            before = len(spans)
            await asyncio.sleep(0.6)


def _answers(hit: pb.SearchHit, question: Question) -> bool:
    pages = range(hit.page, max(hit.page, hit.page_end) + 1)
    return hit.file_name == question.file_name and question.page in pages


def question_of(hit: pb.SearchHit) -> str:
    """What to ask so that a passage should be found: its heading, or how it begins.

    At most 20 words and 200 characters, however long the passage goes on without an end.
    """
    heading = hit.headings[-1] if hit.headings else ""
    if len(heading.split()) >= 2:
        return _short(heading)
    words = " ".join(hit.text.replace("#", " ").replace("|", " ").split())
    sentence = words.split(". ")[0]
    return _short(sentence) if len(sentence) >= 12 else ""


def _short(text: str) -> str:
    words = " ".join(text.split()[:_QUESTION_WORDS_MAX])
    return words[:_QUESTION_CHARACTERS_MAX].rstrip()


def summed(holds: Iterable[cost_pb2.Hold]) -> list[cost_pb2.Hold]:
    """Holds of the same step and provider as one, with the sums of what they used and cost."""
    sums: dict[tuple[Any, ...], cost_pb2.Hold] = {}
    for hold in holds:
        scope = hold.scope
        key = (
            scope.service,
            hold.operation,
            scope.provider,
            scope.model,
            hold.state,
            scope.simulated,
        )
        if key not in sums:
            sums[key] = cost_pb2.Hold()
            sums[key].CopyFrom(hold)
            continue
        total = sums[key]
        for name in ("tokens", "pages", "bytes", "requests"):
            for mine, other in ((total.bound, hold.bound), (total.usage, hold.usage)):
                setattr(mine, name, getattr(mine, name) + getattr(other, name))
        total.held_nanos_usd += hold.held_nanos_usd
        total.charged_nanos_usd += hold.charged_nanos_usd
        total.overrun_nanos_usd += hold.overrun_nanos_usd
        total.unconfirmed |= hold.unconfirmed
    return list(sums.values())
