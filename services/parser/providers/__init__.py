"""The parser's providers: one file each, named as the provider, found by listing this folder.

A provider's file has `Settings` (a pydantic model whose fields begin with the provider's name)
and `create(settings)`, which gives the provider, or None where it is not configured.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import Protocol, TypeVar, cast

from pydantic import BaseModel, create_model

from services.parser.core import Provider


class ProviderFile(Protocol):
    """What a provider's module has."""

    Settings: type[BaseModel]

    def create(self, settings: BaseModel) -> Provider | None:
        """The provider, or None where it is not configured."""


Room = TypeVar("Room", bound=BaseModel)


def files() -> dict[str, ProviderFile]:
    """Every provider's module by the provider's name, in order of name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: cast(ProviderFile, import_module(f"{__name__}.{name}")) for name in names}


def settings(room: type[Room]) -> type[Room]:
    """The room's settings with those of every provider."""
    kinds = (room, *(file.Settings for file in files().values()))
    return cast(type[Room], create_model(room.__name__, __base__=kinds, __doc__=room.__doc__))


def create(configured: BaseModel, first: str) -> dict[str, Provider]:
    """Every configured provider by name, `first` before the others, or ValueError without it."""
    made: dict[str, Provider] = {}
    for name, file in files().items():
        own = file.Settings.model_validate(configured, from_attributes=True)
        provider = file.create(own)
        if provider is not None:
            made[name] = provider
    if first not in made:
        raise ValueError(
            f"TOLLGATE_PARSER_DEFAULT_PROVIDER: {first!r} is not one of {', '.join(made)}"
        )
    return {first: made.pop(first), **made}
