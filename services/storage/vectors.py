"""Vectors: spaces that never mix, revisions that are seen whole or not at all, search by cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chassis.errors import Conflict, InvalidField, SpaceMismatch, Violation
from services.storage.core import missing
from services.storage.names import checked_pairs, checked_text

DIMENSIONS_MAX = 4_000
UPSERT_MAX = 2_048
LOOKUP_MAX = 1_000
HITS_MAX, HITS_DEFAULT = 1_000, 10
SPACE_ID_BYTES_MAX = 256
DOCUMENT_ID_BYTES_MAX = 256
NAME_BYTES_MAX = 128
SHA256_BYTES = 32
# The largest number of IEEE 754 half precision, in which vectors are kept.
HALF_MAX = 65_504.0

Half: TypeAlias = NDArray[np.float16]


@dataclass(frozen=True, slots=True)
class Space:
    """Vectors in one space can be compared with one another and with no others."""

    id: str
    dimensions: int
    simulated: bool
    provider: str
    model: str


@dataclass(frozen=True, slots=True)
class Document:
    """Whose vectors they are."""

    collection: str
    id: str


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector as a caller gives it: components of any precision."""

    id: str
    values: Sequence[float]
    text_sha256: bytes
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class KeptVector:
    """A vector as it is kept: components in half precision."""

    id: str
    values: Half
    text_sha256: bytes
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Hit:
    """A vector that was found; `score` is the cosine, -1 to 1."""

    id: str
    document_id: str
    revision: int
    score: float
    metadata: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for in a collection. `filter` is a set of pairs that metadata must have."""

    collection: str
    values: Half
    limit: int
    filter: Mapping[str, str]


class VectorStore(Protocol):
    """Vectors, kept. A tenant sees its own alone; spaces are properties of models, not tenants'."""

    async def space(self, space_id: str) -> Space | None: ...

    async def ensure_space(self, space: Space) -> Space:
        """The space as it exists, made with these properties if there was none."""
        ...

    async def upsert(
        self,
        tenant: str,
        space: Space,
        document: Document,
        revision: int,
        vectors: Sequence[KeptVector],
    ) -> bool:
        """Write all or none; False when a later revision is active."""
        ...

    async def activate(
        self, tenant: str, space: Space, document: Document, revision: int
    ) -> int | None:
        """How many vectors are seen of the document now; None when a later revision is active."""
        ...

    async def search(self, tenant: str, space: Space, query: Query) -> list[Hit]:
        """The nearest vectors of active revisions, the nearest first."""
        ...

    async def lookup(self, tenant: str, space: Space, hashes: Sequence[bytes]) -> dict[bytes, Half]:
        """One vector for each hash that there is."""
        ...

    async def delete(self, tenant: str, document: Document, revision: int) -> int:
        """Delete a revision, or all of them (0), in every space; returns how many vectors."""
        ...


class Vectors:
    """The rules of vectors, over a store, for one provider."""

    def __init__(self, store: VectorStore) -> None:
        self._store = store

    async def ensure_space(self, space: Space) -> Space:
        """Make sure of a space. Raises SpaceMismatch when it exists with other properties."""
        checked_text("space.id", space.id, SPACE_ID_BYTES_MAX)
        if not 1 <= space.dimensions <= DIMENSIONS_MAX:
            raise InvalidField.of("space.dimensions", f"must be 1 to {DIMENSIONS_MAX:,}")
        checked_text("space.provider", space.provider, NAME_BYTES_MAX, empty=True)
        checked_text("space.model", space.model, SPACE_ID_BYTES_MAX, empty=True)
        found = await self._store.ensure_space(space)
        others = [
            name
            for name in ("dimensions", "simulated", "provider", "model")
            if getattr(found, name) != getattr(space, name)
        ]
        if others:
            raise _mismatch(space.id, f"the space exists with other {' and '.join(others)}")
        return found

    async def upsert(
        self,
        tenant: str,
        space_id: str,
        document: Document,
        revision: int,
        vectors: Sequence[Vector],
        *,
        simulated: bool,
    ) -> int:
        """Write vectors of a revision, all or none; returns how many."""
        _check_document(document)
        _check_revision(revision, least=1)
        if len(vectors) > UPSERT_MAX:
            raise InvalidField.of("vectors", f"must be at most {UPSERT_MAX:,}")
        space = await self._space(space_id, simulated)
        kept = [_kept(f"vectors[{index}]", v, space) for index, v in enumerate(vectors)]
        ids = set[str]()
        for index, vector in enumerate(kept):
            if vector.id in ids:
                raise InvalidField.of(f"vectors[{index}].id", "must be unique within the request")
            ids.add(vector.id)
        if not await self._store.upsert(tenant, space, document, revision, kept):
            raise _superseded(document)
        return len(kept)

    async def activate(self, tenant: str, space_id: str, document: Document, revision: int) -> int:
        """Show a revision and hide the one before; returns how many vectors are seen now."""
        _check_document(document)
        _check_revision(revision, least=1)
        count = await self._store.activate(tenant, await self._space(space_id), document, revision)
        if count is None:
            raise _superseded(document)
        return count

    async def search(
        self,
        tenant: str,
        space_id: str,
        collection: str,
        values: Sequence[float],
        *,
        limit: int,
        filter: Mapping[str, str],  # noqa: A002  # the field's name on the wire
        simulated: bool,
    ) -> list[Hit]:
        """The nearest vectors, the nearest first."""
        checked_text("collection", collection, NAME_BYTES_MAX)
        if not 0 <= limit <= HITS_MAX:
            raise InvalidField.of("limit", f"must be 1 to {HITS_MAX:,}, or 0 for {HITS_DEFAULT}")
        pairs = checked_pairs("filter", filter)
        space = await self._space(space_id, simulated)
        half = _half("values", values, space)
        query = Query(collection, half, limit or HITS_DEFAULT, pairs)
        return await self._store.search(tenant, space, query)

    async def lookup(
        self, tenant: str, space_id: str, hashes: Sequence[bytes]
    ) -> list[tuple[bytes, Half]]:
        """Hash and vector of each hash that there is, in the order given."""
        if len(hashes) > LOOKUP_MAX:
            raise InvalidField.of("text_sha256s", f"must be at most {LOOKUP_MAX:,}")
        asked = dict.fromkeys(
            _hash(f"text_sha256s[{index}]", value) for index, value in enumerate(hashes)
        )
        found = await self._store.lookup(tenant, await self._space(space_id), list(asked))
        return [(value, found[value]) for value in asked if value in found]

    async def delete(self, tenant: str, document: Document, revision: int) -> int:
        """Delete a document's vectors, or those of one revision; returns how many."""
        _check_document(document)
        _check_revision(revision, least=0)
        return await self._store.delete(tenant, document, revision)

    async def _space(self, space_id: str, simulated: bool | None = None) -> Space:
        checked_text("space_id", space_id, SPACE_ID_BYTES_MAX)
        space = await self._store.space(space_id)
        if space is None:
            raise missing("space", space_id)
        if simulated is not None and simulated != space.simulated:
            kinds = ("genuine", "simulated")
            raise _mismatch(
                space_id,
                f"{kinds[simulated]} vectors have no place in a {kinds[not simulated]} space",
            )
        return space


def _kept(field: str, vector: Vector, space: Space) -> KeptVector:
    return KeptVector(
        checked_text(f"{field}.id", vector.id, NAME_BYTES_MAX),
        _half(f"{field}.values", vector.values, space),
        _hash(f"{field}.text_sha256", vector.text_sha256),
        checked_pairs(f"{field}.metadata", vector.metadata),
    )


def _half(field: str, values: Sequence[float], space: Space) -> Half:
    """The components in half precision. Refuses what could not be compared by cosine."""
    given = np.asarray(values, dtype=np.float32)
    if given.shape != (space.dimensions,):
        raise _mismatch(
            space.id, f"{field} has {len(values)} dimensions and the space {space.dimensions}"
        )
    if not np.isfinite(given).all():
        raise InvalidField.of(field, "must be finite")
    if np.abs(given).max() > HALF_MAX:
        raise InvalidField.of(field, f"must be within ±{HALF_MAX:,.0f}")
    half: Half = given.astype(np.float16)
    if not half.any():
        raise InvalidField.of(field, "must not be all zero in half precision")
    return half


def _hash(field: str, value: bytes) -> bytes:
    if len(value) != SHA256_BYTES:
        raise InvalidField.of(field, f"must be {SHA256_BYTES} bytes")
    return value


def _check_document(document: Document) -> None:
    checked_text("collection", document.collection, NAME_BYTES_MAX)
    checked_text("document_id", document.id, DOCUMENT_ID_BYTES_MAX)


def _check_revision(revision: int, *, least: int) -> None:
    if revision < least:
        raise InvalidField.of("revision", f"must be at least {least}")


def _mismatch(space_id: str, why: str) -> SpaceMismatch:
    return SpaceMismatch(why, violations=[Violation(f"space/{space_id}", why)])


def _superseded(document: Document) -> Conflict:
    subject = f"document/{document.collection}/{document.id}"
    why = "a later revision is active"
    return Conflict(f"{why} of the document", violations=[Violation(subject, why)])
