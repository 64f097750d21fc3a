"""Vectors with pgvector, in the room's own database."""

from __future__ import annotations

from services.storage.provider import Means, Provider
from services.storage.vectors import Vectors


def provide(means: Means) -> Provider:
    """Vectors that stay."""
    return Provider("pgvector", simulated=False, vectors=Vectors(means.vector_store))
