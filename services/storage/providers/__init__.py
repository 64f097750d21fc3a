"""Storage's providers: every file here is one, and its name is the provider's.

A provider's file has `provide(means)`, which makes it from what the daemon has.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import cast

from services.storage.core import Blobs, Catalog, Objects
from services.storage.vectors import Vectors, VectorStore


@dataclass(frozen=True, slots=True)
class Provider:
    """What can do storage's work: with objects, with vectors, or with both."""

    name: str
    simulated: bool
    objects: Objects | None = None
    vectors: Vectors | None = None


@dataclass(frozen=True, slots=True)
class Means:
    """What a provider may be made of."""

    objects_dir: Path
    """Where a provider that keeps bytes on this host keeps them."""
    free_bytes_min: int
    """The free space below which such a provider refuses to write."""
    memory_bytes_max: int
    """The most bytes of objects that a provider keeps in memory."""
    memory_vectors_max: int
    """The most vectors that a provider keeps in memory."""
    catalog: Callable[[str], Catalog]
    """The catalog in PostgreSQL of the provider of this name."""
    vector_store: VectorStore
    """Vectors in PostgreSQL."""
    objects: Callable[[Catalog, Blobs], Objects]
    """The rules of objects, over a catalog and blobs."""


def names() -> list[str]:
    """The name of every provider that there is, sorted."""
    return sorted(found.name for found in pkgutil.iter_modules(__path__))


def provided(name: str, means: Means) -> Provider:
    """The provider of this name, which must be one of `names()`."""
    provide = cast(Callable[[Means], Provider], import_module(f"{__name__}.{name}").provide)
    return provide(means)
