"""What all commands share: the options that say which mesh and who, and how a command ends."""

from __future__ import annotations

import asyncio
import inspect
import typing
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Concatenate, ParamSpec

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from chassis import call as calls
from chassis.call import Call
from chassis.errors import InvalidField, NotFound, TollgateError
from chassis.identity import sign
from chassis.settings import MeshSettings, SettingsError, load_mesh
from cli.caller import Caller, Unreachable
from cli.terminal import FAILED, INTERRUPTED, UNREACHABLE, USAGE, Terminal

P = ParamSpec("P")

TENANT = "default"

_MESH = "Which mesh"
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Router = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="TOLLGATE_ROUTER_ADDRESS",
        help="The router's address.",
        rich_help_panel=_MESH,
    ),
]
Cost = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        envvar="TOLLGATE_COST_ADDRESS",
        help="The cost daemon's address.",
        rich_help_panel=_MESH,
    ),
]
Tenant = Annotated[
    str | None,
    typer.Option(
        envvar="TOLLGATE_TENANT",
        help=f"Whom to speak for, where no API key says it; `{TENANT}` when absent.",
        rich_help_panel=_MESH,
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="TOLLGATE_API_KEY",
        help="The key that the router asks for.",
        rich_help_panel=_MESH,
        show_envvar=True,
    ),
]
_SHARED: dict[str, tuple[Any, Any]] = {
    "router": (Router, None),
    "cost": (Cost, None),
    "tenant": (Tenant, None),
    "api_key": (ApiKey, None),
    "as_json": (Json, False),
}


class Failed(Exception):
    """The command did not do what it was asked. The message is one line for people."""

    def __init__(self, message: str = "", *, reason: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.message, self.reason, self.hint = message, reason, hint


class Misused(Failed):
    """The command was asked for something that it does not know."""


@dataclass(frozen=True)
class Session:
    """One run of a command: where the mesh is, who asks, and where the words go."""

    mesh: MeshSettings
    terminal: Terminal
    tenant_given: str = ""
    api_key: str = ""

    @property
    def tenant(self) -> str:
        """Whom the command speaks for where no key says it."""
        return self.tenant_given or TENANT

    def with_mesh(self, mesh: MeshSettings) -> Session:
        """The same, of another mesh."""
        return replace(self, mesh=mesh)

    def router(self) -> Caller:
        """The gate, as any client sees it."""
        who = (
            ("authorization", f"Bearer {self.api_key}")
            if self.api_key
            else (calls.TENANT, self.tenant)
        )
        return Caller("router", self.mesh.router_address, self.mesh, [who])

    def ledger(self) -> Caller:
        """The cost daemon, which wants an identity of the mesh."""
        identity = sign(self.call(), self.mesh.secret)
        return Caller(
            "cost daemon", self.mesh.cost_address, self.mesh, [(calls.IDENTITY, identity)]
        )

    def call(self) -> Call:
        """Who asks, for the identity inside the mesh."""
        return Call(tenant=self.tenant, request_id=calls.new_request_id())


def command(
    app: typer.Typer,
    name: str | None = None,
    *,
    more_faults: Callable[[], list[str]] = list,
    **settings: Any,
) -> Callable[[Callable[Concatenate[Session, P], Any]], Callable[Concatenate[Session, P], Any]]:
    """Make a command of a function, async or not, that takes a Session first.

    The options that all commands share are added, and whatever goes wrong becomes one line and an
    exit code. The function itself stays as it is, to be called from others. Where the shared
    settings are at fault, `more_faults` says what else is, to be told with them.
    """

    def register(
        function: Callable[Concatenate[Session, P], Any],
    ) -> Callable[Concatenate[Session, P], Any]:
        own = list(inspect.signature(function).parameters.values())[1:]
        hints = typing.get_type_hints(function, include_extras=True)
        options = [
            inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hint)
            for n, (hint, default) in _SHARED.items()
        ]
        own = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own]

        def invoke(**given: Any) -> None:
            shared = {key: given.pop(key) for key in _SHARED}
            terminal = Terminal(as_json=shared["as_json"])
            with ending(terminal):
                _check_text(given)
                try:
                    session = _session(terminal, **shared)
                except SettingsError as error:
                    every = dict.fromkeys([*error.faults, *more_faults()])
                    raise SettingsError(list(every)) from None
                outcome = function(session, **given)  # type: ignore[call-arg]  # by name
                if inspect.isawaitable(outcome):
                    asyncio.run(_awaited(outcome))

        signature = inspect.Signature([*own, *options])
        invoke.__signature__ = signature  # type: ignore[attr-defined]  # what typer reads
        invoke.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        invoke.__doc__ = function.__doc__
        app.command(name or function.__name__, **settings)(invoke)
        return function

    return register


async def _awaited(outcome: Awaitable[Any]) -> None:
    await outcome


def _check_text(given: dict[str, Any]) -> None:
    """Raise Misused for words that are no UTF-8: no message can carry them."""
    for name, value in given.items():
        for text in value if isinstance(value, list | tuple) else [value]:
            if isinstance(text, str) and not text.isascii():
                try:
                    text.encode()
                except UnicodeEncodeError:
                    raise Misused(f"{name.replace('_', ' ')}: must be UTF-8") from None


def _session(
    terminal: Terminal,
    *,
    router: str | None,
    cost: str | None,
    tenant: str | None,
    api_key: str | None,
    as_json: bool,
) -> Session:
    faults = [*_name_faults(tenant), *_key_faults(api_key)]
    mesh = load_mesh()
    for option, address in (("router", router), ("cost", cost)):
        if not address:
            continue
        try:
            # Validated as it would be from the environment.
            update = {f"{option}_address": _without_scheme(address)}
            mesh = MeshSettings(**(mesh.model_dump() | update))
        except (ValidationError, ValueError):
            faults.append(f"--{option}: must be HOST:PORT or unix:PATH, such as 127.0.0.1:50050")
    if faults:
        raise Misused("; ".join(faults))
    return Session(mesh, terminal, tenant or "", (api_key or "").strip())


def _name_faults(tenant: str | None) -> list[str]:
    if tenant is None:
        return []
    try:
        calls.checked_name("tenant", tenant)
    except InvalidField as error:
        return [error.message]
    return []


def _key_faults(api_key: str | None) -> list[str]:
    """A file of one line ends with a newline, which is no part of the key."""
    key = (api_key or "").strip()
    return [] if key.isascii() and key.isprintable() else ["API key: must be printable ASCII"]


def _without_scheme(address: str) -> str:
    """The address as given. Raises ValueError for a URL, which gRPC takes for a name to resolve."""
    if not address.startswith("unix:") and ("/" in address or not address.isprintable()):
        raise ValueError
    return address


@contextmanager
def ending(terminal: Terminal) -> Iterator[None]:
    """Every way in which a command can end badly, as one line and an exit code."""
    try:
        yield
    except SettingsError as error:
        terminal.error("; ".join(error.faults), reason="settings")
        raise typer.Exit(USAGE) from None
    except Misused as error:
        terminal.error(error.message, reason=error.reason, hint=error.hint)
        raise typer.Exit(USAGE) from None
    except Failed as error:
        if error.message:
            terminal.error(error.message, reason=error.reason, hint=error.hint)
        raise typer.Exit(FAILED) from None
    except Unreachable as error:
        terminal.error(
            str(error),
            reason="unreachable",
            hint="start the mesh with `tollgate up`, or name another with --router and --cost",
        )
        raise typer.Exit(UNREACHABLE) from None
    except TollgateError as error:
        terminal.error(described(error), reason=error.reason)
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:
        terminal.say()
        raise typer.Exit(INTERRUPTED) from None


def described(error: TollgateError) -> str:
    """An error of the mesh in one line: its message, what was violated, and when to try again."""
    parts = [error.message]
    for violation in error.violations:
        words = f"{violation.subject}: {violation.description}"
        if isinstance(error, NotFound) and violation.subject.partition("/")[2] in error.message:
            continue  # The message has named what is not there.
        if words not in parts and violation.description not in error.message:
            parts.append(words)
    if error.retry_after_s:
        parts.append(f"try again in {error.retry_after_s:g} s")
    return "; ".join(part for part in parts if part).replace("\n", " ")


class DefaultGroup(TyperGroup):
    """A group whose first command is meant where none is named: `limits` is `limits list`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the default command's name first where the first word can only be meant for it."""
        names = self.list_commands(ctx)
        if not args or args[0] not in {*names, "--help", *ctx.help_option_names}:
            default = self.get_command(ctx, names[0])
            takes_words = default and any(p.param_type_name == "argument" for p in default.params)
            if takes_words or not args or args[0].startswith("-"):
                args = [names[0], *args]
        return super().parse_args(ctx, args)


def group(help_text: str) -> typer.Typer:
    """A group of commands whose first one is the default."""
    return typer.Typer(cls=DefaultGroup, help=help_text, no_args_is_help=False)
