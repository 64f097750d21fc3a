"""What a provider of storage is, and what it may be made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
