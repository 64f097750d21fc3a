"""`tollgate keys` and `tollgate token`: who may call."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from chassis.call import IDENTITY
from chassis.errors import InvalidField
from chassis.identity import LIFETIME_S, sign
from chassis.keys import Key, KeyFile, KeysError, default_path
from cli.command import Failed, Misused, Session, command, group
from cli.terminal import table

app = typer.Typer()
keys = group("The API keys of a mesh, in a file of hashes that its router reads.")
app.add_typer(keys, name="keys")

File = Annotated[
    Path | None,
    typer.Option(
        "--file",
        envvar="TOLLGATE_ROUTER_KEYS_FILE",
        help="The file of keys; `keys.jsonl` in the state directory when absent.",
    ),
]


def _file(session: Session, path: Path | None) -> KeyFile:
    return KeyFile(path or default_path(session.mesh.state_dir))


def _told(key: Key) -> dict[str, Any]:
    return {name: value for name, value in asdict(key).items() if name != "sha256"}


@command(keys, "list")
def list_keys(session: Session, path: File = None) -> None:
    """List the API keys: to whom they belong, never the keys themselves."""
    try:
        found = _file(session, path).keys()
    except KeysError as error:
        raise Failed(str(error)) from None
    session.terminal.json([_told(key) for key in found])
    if not found:
        session.terminal.say("no keys: `tollgate keys add NAME --tenant TENANT` makes one")
        return
    rows = [
        (k.id, k.name, k.tenant, k.project, "yes" if k.operator else "", k.created) for k in found
    ]
    session.terminal.show(
        table("id", "name", "tenant", "project", "operator", "created", rows=rows)
    )


@command(keys)
def add(
    session: Session,
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    project: Annotated[str, typer.Option(help="The project that its calls are for.")] = "",
    operator: Annotated[
        bool, typer.Option("--operator", help="Whether it may switch modes.")
    ] = False,
    path: File = None,
) -> None:
    """Make an API key for the tenant of --tenant, and print it, once.

    For example: export TOLLGATE_API_KEY=$(tollgate keys add me)
    """
    try:
        key, text = _file(session, path).add(
            name, tenant=session.tenant, project=project, operator=operator
        )
    except InvalidField as error:
        raise Misused(error.message) from None
    except KeysError as error:
        raise Failed(str(error)) from None
    session.terminal.json(_told(key) | {"key": text})
    if not session.terminal.as_json:
        # The key alone, to be used within $(…); what is for people goes past it.
        print(text)
        session.terminal.errors.print(
            f"the key of {escape(key.tenant)}, id {key.id}; it is not shown again. Use it with "
            "TOLLGATE_API_KEY, or as `authorization: Bearer …`",
            style="dim",
        )


@command(keys)
def revoke(
    session: Session,
    key_id: Annotated[str, typer.Argument(help="The key's id, as `tollgate keys` lists it.")],
    path: File = None,
) -> None:
    """Take a key away; the router refuses it at once."""
    try:
        key = _file(session, path).revoke(key_id)
    except KeysError as error:
        raise Failed(str(error)) from None
    session.terminal.json(_told(key))
    session.terminal.say(f"revoked {key.id} ({escape(key.name)} of {escape(key.tenant)})")


@command(app)
def token(session: Session) -> None:
    """Print the identity header that a daemon behind the router asks for, for debugging.

    For example: grpcurl -plaintext -H "$(tollgate token)" localhost:50051 list
    """
    identity = sign(session.call(), session.mesh.secret)
    session.terminal.json(
        {"header": IDENTITY, "value": identity, "tenant": session.tenant, "valid_s": LIFETIME_S}
    )
    if not session.terminal.as_json:
        # Plain, in one line however long, to be used within $(…).
        print(f"{IDENTITY}: {identity}")
