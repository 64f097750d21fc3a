"""`tollgate up`: the whole mesh on this machine, until Ctrl-C."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import RenderableType
from rich.live import Live
from rich.markup import escape
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from chassis.settings import Address, MeshSettings, RoomSettings, load, room_config
from cli.command import Failed, Session, command
from cli.supervisor import ROOMS, Interrupted, Reporter, Supervisor, UpError, settings_faults
from cli.terminal import INTERRUPTED, Terminal, table

app = typer.Typer()

_SAMPLES = os.path.relpath(Path(__file__).with_name("demo") / "documents")
_WHAT = {
    "router": "the one address for clients",
    "cost": "the ledger: limits, holds, prices, usage",
    "parser": "documents into pages",
    "embedder": "texts into vectors",
    "storage": "objects and vectors",
    "corpus": "documents that can be searched",
}


@command(app, more_faults=settings_faults)
async def up(session: Session) -> None:
    """Start every daemon on this machine, and keep them running until Ctrl-C.

    Each is a process of its own, on an embedded PostgreSQL unless TOLLGATE_DATABASE_URL names
    another. Logs are in the state directory (TOLLGATE_STATE_DIR), under logs/.
    """
    terminal = session.terminal
    told = Told(terminal)
    supervisor = Supervisor(session.mesh, told.reporter())
    try:
        with told.starting():
            context = supervisor.running()
            await context.__aenter__()
        try:
            _tell_where(session.mesh, _Gate.load(), terminal)
            await supervisor.stopping.wait()
        finally:
            terminal.say()
            terminal.say("stopping; once more Ctrl-C stops at once", style="dim")
            await context.__aexit__(None, None, None)
    except UpError as error:
        raise Failed(str(error), reason="cannot start") from None
    except Interrupted:
        terminal.say("stopped before it was up")
        terminal.json({"event": "stopped"}, in_one_line=True)
        raise typer.Exit(INTERRUPTED) from None
    terminal.say("stopped; nothing is left running")
    terminal.json({"event": "stopped"}, in_one_line=True)


class _Gate(RoomSettings):
    """Those of the router's settings that its callers must know of."""

    model_config = room_config("router")

    listen: Address = "127.0.0.1:50050"
    authentication: str = "none"
    keys_file: Path | None = None

    @classmethod
    def load(cls) -> _Gate:
        """As the router reads them."""
        return load(MeshSettings, cls)[1]


class Told:
    """How far the mesh is: a line that changes for each daemon on a terminal, else plain lines."""

    def __init__(self, terminal: Terminal, *, with_events: bool = True) -> None:
        self._terminal, self._with_events = terminal, with_events
        self._states = dict.fromkeys(("database", *ROOMS), "waiting")
        self._live: Live | None = None

    def reporter(self) -> Reporter:
        """What a supervisor tells."""
        return Reporter(self._progress, self._line)

    @contextmanager
    def starting(self) -> Iterator[None]:
        """Show the states within, as they change."""
        terminal = self._terminal
        if terminal.as_json or not terminal.console.is_terminal:
            yield
            return
        with Live(self, console=terminal.console, refresh_per_second=10, transient=True) as live:
            self._live = live
            try:
                yield
            finally:
                self._live = None

    def __rich__(self) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        for name, state in self._states.items():
            is_ready = not state.startswith(("waiting", "starting"))
            mark: RenderableType = Text("✓", style="green")
            if not is_ready:
                # Drawn by the clock, so that every line turns in step.
                mark = Spinner("dots").render(time.monotonic())
            grid.add_row(mark, name, Text(state, style="" if is_ready else "dim"))
        return grid

    def _progress(self, name: str, state: str) -> None:
        self._states[name] = state
        self._event({"event": "progress", "of": name, "state": state})
        if self._live is None and not self._terminal.console.is_terminal:
            self._terminal.say(f"{name}: {state}")

    def _event(self, event: dict[str, str]) -> None:
        if self._with_events:
            self._terminal.json(event, in_one_line=True)

    def _line(self, text: str) -> None:
        self._event({"event": "notice", "message": text})
        clock = time.strftime("%H:%M:%S")
        self._terminal.say(f"[dim]{clock}[/] {escape(text)}")


def _tell_where(mesh: MeshSettings, gate: _Gate, terminal: Terminal) -> None:
    addresses = {room: getattr(mesh, f"{room}_address") for room in sorted(ROOMS, key=_order)}
    with_key = gate.authentication == "keys"
    curl = by_reflection(mesh.router_address, with_key=with_key)
    program = "tollgate" if shutil.which("tollgate") else _beside("tollgate")
    first = variables(mesh, gate.keys_file)
    if with_key:
        first.append(f"export TOLLGATE_API_KEY=$({program} keys add me)")
    terminal.json(
        {
            "event": "serving",
            "pid": os.getpid(),
            "addresses": addresses,
            "state_dir": str(mesh.state_dir.absolute()),
            "first": first,
            "curl": curl,
        },
        in_one_line=True,
    )
    rows = [(name, address, _WHAT[name]) for name, address in addresses.items()]
    terminal.show(table("daemon", "address", "what it is", rows=rows))
    terminal.say(f"state and logs in {escape(str(mesh.state_dir))}\n", style="dim")
    terminal.say("Try it in another terminal, in this directory:")
    for line in first:
        _as_it_is(line, terminal)
    for words, what in (
        (f"add {_SAMPLES}", "add the sample documents"),
        ('search "too windy to lift?"', "find a passage by its meaning"),
        ("usage", "what was used and charged"),
        ("limits", "what may be spent"),
        ("trace", "the newest request, everywhere"),
        ("health", "whether all is well"),
    ):
        if words == "trace" and mesh.otlp_endpoint:
            continue  # Traces are at the collector.
        # A comment, so that the whole line can be copied.
        terminal.say(f"  [bold]{escape(f'{program} {words}'):<47}[/]  [dim]# {what}[/]")
    terminal.say("\nOr any gRPC client, by reflection:")
    _as_it_is(curl, terminal)
    terminal.say("\nCtrl-C stops everything.")


def _as_it_is(line: str, terminal: Terminal) -> None:
    """A line that a terminal folds can still be copied whole."""
    if not terminal.as_json:
        terminal.console.print(f"  {escape(line)}", soft_wrap=True)


def variables(mesh: MeshSettings, keys_file: Path | None = None) -> list[str]:
    """What a shell must say for its commands to find this mesh: a line each, no secrets."""
    needed = {
        f"TOLLGATE_{name.upper()}": str(getattr(mesh, name))
        for name in (*(f"{room}_address" for room in sorted(ROOMS, key=_order)), "state_dir")
        if getattr(mesh, name) != MeshSettings.model_fields[name].default
    }
    if keys_file is not None:
        needed["TOLLGATE_ROUTER_KEYS_FILE"] = str(keys_file)
    lines = [f"export {name}={shlex.quote(value)}" for name, value in needed.items()]
    if mesh.mesh_secret is not None:
        lines.append("# with the same TOLLGATE_MESH_SECRET as here")
    return lines


def _order(room: str) -> int:
    return list(_WHAT).index(room)


def by_reflection(router_address: str, *, with_key: bool = False) -> str:
    """A line for a shell that asks the router for its backends with nothing but reflection.

    With grpcurl where it is on the PATH, else with the buf of this environment; with the key of
    TOLLGATE_API_KEY where the router asks for one.
    """
    method = "tollgate.router.v1.RouterService/ListBackends"
    header = '-H "authorization: Bearer $TOLLGATE_API_KEY" ' if with_key else ""
    buf = _buf()
    if shutil.which("grpcurl") or not buf:
        return f"grpcurl -plaintext {header}{router_address} {method}"
    return (
        f"{shlex.quote(buf)} curl --protocol grpc --http2-prior-knowledge {header}"
        f"http://{router_address}/{method}"
    )


def _buf() -> str:
    """The buf executable: of this environment, else on the PATH; empty where there is none."""
    return _beside("buf") or ("buf" if shutil.which("buf") else "")


def _beside(program: str) -> str:
    """A program of this environment, from here where that is shorter; empty where it has none."""
    path = Path(sys.executable).with_name(program)
    return min(os.path.relpath(path), str(path), key=len) if path.exists() else ""
