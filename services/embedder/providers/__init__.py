"""The embedder's providers: every file here is one, and its name is the provider's.

A provider's file has `Settings`, its own settings under `TOLLGATE_EMBEDDER_<NAME>_`, and
`provider(settings, cache_dir)`, which makes it without starting it.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Protocol, cast

from pydantic_settings import BaseSettings

from services.embedder.core import Provider


class ProviderFile(Protocol):
    """What a file of this folder has."""

    @property
    def Settings(self) -> type[BaseSettings]: ...

    def provider(self, settings: BaseSettings, cache_dir: Path) -> Provider: ...


def names() -> list[str]:
    """The name of every provider that there is, sorted."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def file_of(name: str) -> ProviderFile:
    """The file of a provider, imported only now; `name` must be one of `names()`."""
    return cast(ProviderFile, import_module(f"{__name__}.{name}"))
