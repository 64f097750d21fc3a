"""Every environment variable that the code knows, found in the code itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from importlib import import_module
from pathlib import Path

from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings

from chassis.settings import MeshSettings, RoomSettings

ROOT = Path(__file__).parents[2]
ROOMS = sorted(path.parent.name for path in (ROOT / "services").glob("*/main.py"))
COMPUTED = "the cores"


@dataclass(frozen=True, slots=True)
class Variable:
    """A setting as the environment has it: its name, and its default as a page would write it."""

    name: str
    default: str
    description: str


def settings_of(room: str) -> type[RoomSettings]:
    """The settings of a room, those of providers that share its class included."""
    kind: type[RoomSettings] = import_module(f"services.{room}.main").Settings
    return kind


def provider_settings() -> list[type[BaseSettings]]:
    """The settings of providers that have a class of their own."""
    found = []
    for path in sorted((ROOT / "services").glob("*/providers/*.py")):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        kind = getattr(import_module(module), "Settings", None)
        if isinstance(kind, type) and issubclass(kind, BaseSettings):
            found.append(kind)
    return found


def variables(kind: type[BaseSettings]) -> Iterator[Variable]:
    """Every variable that a class of settings reads."""
    prefix = kind.model_config.get("env_prefix", "")
    for name, field in kind.model_fields.items():
        yield Variable(f"{prefix}{name}".upper(), _written(field), field.description or "")


def all_variables() -> list[Variable]:
    """The mesh's, then each room's, then those of providers."""
    rooms = map(settings_of, ROOMS)
    kinds: list[type[BaseSettings]] = [MeshSettings, *rooms, *provider_settings()]
    return [variable for kind in kinds for variable in variables(kind)]


def command_variables() -> set[str]:
    """What the command line reads besides the settings."""
    text = "".join(path.read_text() for path in (ROOT / "cli").rglob("*.py"))
    return set(re.findall(r'envvar="(TOLLGATE_\w+)"', text))


def _written(field: FieldInfo) -> str:
    value = COMPUTED if field.default_factory is not None else field.default
    if isinstance(value, Enum):
        return str(value.value)
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return f"{value:.15g}"
    return str(value)
