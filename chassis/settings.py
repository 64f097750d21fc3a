"""Settings: environment variables first, then secret files, `.env.{environment}` and `.env`.

Shared settings have the prefix `TOLLGATE_`, a room's own `TOLLGATE_<ROOM>_`. Any setting can be
read from a file by adding `_FILE` to its name, which is how container secrets arrive. All faults
are reported at once, with the names of the variables and never their values.
"""

from __future__ import annotations

import os
import re
import secrets
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin
from urllib.parse import urlsplit

from dotenv import dotenv_values
from pydantic import AfterValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as SourceError

PREFIX = "TOLLGATE_"


class SettingsError(Exception):
    """One or more settings cannot be used. The message names each, one a line, without values."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _config(prefix: str) -> SettingsConfigDict:
    return SettingsConfigDict(env_prefix=prefix, extra="ignore", frozen=True)


def room_config(room: str) -> SettingsConfigDict:
    """The `model_config` of a room's settings, so that they are read from `TOLLGATE_<ROOM>_…`."""
    return _config(f"{PREFIX}{room.upper()}_")


def _address(value: str) -> str:
    if value.startswith("unix:"):
        if len(value.removeprefix("unix:").encode()) > 107:
            raise ValueError("a unix socket's path has at most 107 bytes")
        return value
    host, colon, port = value.rpartition(":")
    if not (host and "/" not in host and colon and port.isdecimal() and int(port) < 65536):
        raise ValueError("must be HOST:PORT or unix:PATH")
    return value


Address = Annotated[str, AfterValidator(_address)]


def _database_url(value: SecretStr) -> SecretStr:
    url = urlsplit(value.get_secret_value())
    try:
        if url.scheme in ("postgresql", "postgres") and (url.port is None or url.port > 0):
            return value
    except ValueError:
        pass  # A port that is no number.
    raise ValueError("must be postgresql://USER:PASSWORD@HOST:PORT/DATABASE")


DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]


class _SecretFiles(PydanticBaseSettingsSource):
    """Reads a setting from the file that `<NAME>_FILE` names."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        variable, path = self._named(field_name)
        if not path:
            return None, field_name, False
        try:
            text = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError):
            raise SettingsError([f"{variable}: the file cannot be read"]) from None
        try:
            # Lists and the like are JSON, in a file as in a variable, also where they may be unset.
            listed = any(get_origin(kind) in (list, dict) for kind in get_args(field.annotation))
            return self.prepare_field_value(field_name, field, text, listed), field_name, False
        except ValueError:
            raise SettingsError([f"{variable}: must hold JSON of the right shape"]) from None

    def faults(self) -> list[str]:
        """What is wrong with the files that are named."""
        found: list[str] = []
        for name, field in self.settings_cls.model_fields.items():
            try:
                self.get_field_value(field, name)
            except SettingsError as error:
                found += error.faults
        return found

    def _named(self, field_name: str) -> tuple[str, str | None]:
        variable = f"{self.config.get('env_prefix', '')}{field_name}_file".upper()
        return variable, os.environ.get(variable) or _env_files().get(variable)

    def __call__(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, field in self.settings_cls.model_fields.items():
            with suppress(SettingsError):  # `load` tells it, together with all other faults.
                found[name] = self.get_field_value(field, name)[0]
        return {name: value for name, value in found.items() if value is not None}


class _Settings(BaseSettings):
    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _SecretFiles(settings_cls), dotenv_settings


class MeshSettings(_Settings):
    """What every daemon and the command line share."""

    model_config = _config(PREFIX)

    environment: str = Field("local", description="Chooses `.env.{environment}`.")
    state_dir: Path = Field(
        Path(".tollgate"),
        description="Where the embedded database, the mesh secret, objects, models and traces are.",
    )

    database_url: DatabaseUrl | None = Field(
        None, description="PostgreSQL 15 or later with pgvector; unset: an embedded one."
    )
    database_direct_url: DatabaseUrl | None = Field(
        None, description="The same database past its pooler, for migrations and listeners."
    )
    database_pooled: bool = Field(
        False, description="Whether the URL goes through a transaction-mode pooler."
    )

    mesh_secret: SecretStr | None = Field(
        None, description="Signs identities inside the mesh; unset: made once in the state dir."
    )

    router_address: Address = Field("127.0.0.1:50050", description="Where the router is dialled.")
    cost_address: Address = Field("127.0.0.1:50051", description="Where the ledger is dialled.")
    parser_address: Address = Field("127.0.0.1:50052", description="Where the parser is dialled.")
    embedder_address: Address = Field(
        "127.0.0.1:50053", description="Where the embedder is dialled."
    )
    storage_address: Address = Field("127.0.0.1:50054", description="Where storage is dialled.")
    corpus_address: Address = Field("127.0.0.1:50055", description="Where the corpus is dialled.")

    trace_sample_ratio: float = Field(
        1.0, ge=0, le=1, description="The share of new traces that are kept."
    )
    otlp_endpoint: str | None = Field(
        None, description="An OTLP/gRPC collector; unset: traces go to files in the state dir."
    )
    log_level: str = Field(
        "INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="The least that is logged."
    )

    drain_s: float = Field(
        0.0, ge=0, le=300, description="How long to say NOT_SERVING before refusing calls."
    )
    grace_s: float = Field(
        10.0, ge=0, le=600, description="How long calls under way may finish at shutdown."
    )
    keepalive_s: float = Field(30.0, ge=10, description="How often an idle connection is tried.")
    max_connection_age_s: float = Field(
        3600.0, ge=1, description="When a connection is closed so that clients spread anew."
    )
    message_bytes_max: int = Field(
        64 << 20,
        ge=36 << 20,
        description="The largest message that a daemon reads; a larger one is refused by gRPC.",
    )
    calls_max: int = Field(
        4096, ge=1, description="Calls under way at which a daemon refuses more."
    )

    @cached_property
    def secret(self) -> bytes:
        """The mesh secret, made on first use where none is set."""
        if self.mesh_secret is not None:
            return self.mesh_secret.get_secret_value().encode()
        return _made_once(self.state_dir / "mesh.secret")


class RoomSettings(_Settings):
    """What every room has. A room's `Settings` extend this with `room_config(room)`."""

    listen: Address


def _made_once(path: Path) -> bytes:
    """A random secret that the first of several processes writes and all of them read."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        mine = path.with_name(f"{path.name}.{os.getpid()}")
        mine.touch(mode=0o600)
        mine.write_text(secrets.token_urlsafe(32))
        try:
            os.link(mine, path)  # Fails where another was first, and is whole where it succeeds.
        except FileExistsError:
            pass
        finally:
            mine.unlink()
    return path.read_text().strip().encode()


Mesh = TypeVar("Mesh", bound=BaseSettings)
Room = TypeVar("Room", bound=BaseSettings)


def load(mesh: type[Mesh], room: type[Room]) -> tuple[Mesh, Room]:
    """Read both kinds of settings from the environment and its files.

    Raises SettingsError naming every variable that cannot be used.
    """
    faults: list[str] = []
    found = [_read(kind, faults) for kind in (mesh, room)]
    if faults:
        raise SettingsError(faults)
    return cast(tuple[Mesh, Room], tuple(found))


def load_mesh() -> MeshSettings:
    """Read the shared settings alone, as the command line does. Raises SettingsError."""
    faults: list[str] = []
    found = _read(MeshSettings, faults)
    if found is None:
        raise SettingsError(faults)
    return found


def _read(kind: type[Mesh], faults: list[str]) -> Mesh | None:
    prefix = kind.model_config.get("env_prefix", "")
    faults += _SecretFiles(kind).faults()
    try:
        return kind(_env_file=_env_file_names())
    except ValidationError as error:
        for fault in error.errors(include_input=False, include_url=False, include_context=False):
            name = f"{prefix}{fault['loc'][0] if fault['loc'] else ''}".upper()
            faults.append(f"{name}: {_plain(fault['msg'])}")
    except SourceError as error:
        # The library names the field; it stops at the first of these.
        field = re.search(r'field "(\w+)"', str(error))
        name = f"{prefix}{field[1] if field else '*'}".upper()
        faults.append(f"{name}: must be JSON of the right shape")
    return None


def _plain(said: str) -> str:
    """What the library says of a value, in words for people."""
    said = said.removeprefix("Value error, ").split(", unable to parse")[0]
    return said.replace("Input should be", "must be").replace("String should", "must")


def _env_file_names() -> tuple[str, ...]:
    """The later wins."""
    environment = os.environ.get(f"{PREFIX}ENVIRONMENT") or dotenv_values(".env").get(
        f"{PREFIX}ENVIRONMENT"
    )
    return ".env", f".env.{environment or 'local'}"


def _env_files() -> dict[str, str | None]:
    return {k.upper(): v for name in _env_file_names() for k, v in dotenv_values(name).items()}
