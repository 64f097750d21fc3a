"""What storage promises of vectors, asked of the real daemon on the real database."""

from __future__ import annotations

import asyncio
import hashlib
from typing import Any

import asyncpg
import numpy as np
import pytest
from tollgate.storage.v1 import vector_pb2 as vpb

from chassis.errors import (
    Conflict,
    InvalidField,
    NotFound,
    ProviderUnavailable,
    SpaceMismatch,
)
from chassis.server import Daemon
from chassis.settings import MeshSettings
from services.storage.main import Settings, wire
from tests.storage.storage_caller import Caller, calling_as, vector

X, Y, Z = [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]


async def test_the_nearest_are_found_in_order(finder: Caller) -> None:
    """Hits come by falling cosine, with document, revision and metadata, at most `limit`."""
    await finder.upsert(
        "d1",
        1,
        [
            vector("same", [2.0, 0.0, 0.0], page="1"),
            vector("near", [1.0, 0.5, 0.0], page="2"),
            vector("far", Y, page="3"),
        ],
    )
    await finder.upsert("d2", 7, [vector("opposite", [-3.0, 0.0, 0.0])])
    assert (await finder.activate("d1", 1), await finder.activate("d2", 7)) == (3, 1)
    hits = await finder.search(X)
    assert [hit.id for hit in hits] == ["same", "near", "far", "opposite"]
    assert [hit.score for hit in hits] == pytest.approx([1.0, 0.894427, 0.0, -1.0], abs=1e-3)
    assert (hits[1].document_id, hits[1].revision, dict(hits[1].metadata)) == (
        "d1",
        1,
        {"page": "2"},
    )
    assert (hits[3].document_id, hits[3].revision) == ("d2", 7)
    assert [hit.id for hit in await finder.search(X, limit=1)] == ["same"]
    assert [hit.id for hit in await finder.search(X, filter={"page": "3"})] == ["far"]
    assert await finder.search(X, filter={"page": "3", "none": ""}) == []
    assert await finder.search(X, collection="other") == []


async def test_every_answer_says_what_it_used_and_whence_it_came(finder: Caller) -> None:
    """One request, no bytes; provenance names the provider and, where there is one, the space."""
    await finder.upsert("d", 1, [vector("a", X)])
    for doing in (finder.space(), finder.activate("d", 1), finder.search(X)):
        await doing
        assert (finder.usage.requests, finder.usage.bytes) == (1, 0)
        assert finder.provenance.provider == finder.provider
        assert finder.provenance.simulated == (finder.provider == "mock")
        assert finder.provenance.space_id == "s"
    await finder.delete_vectors("d")
    assert finder.provenance.space_id == ""


async def test_a_revision_is_seen_when_it_is_activated_and_not_before(finder: Caller) -> None:
    """The old revision serves until the new one is activated; then that one alone does."""
    await finder.upsert("d", 1, [vector("a", X), vector("b", Y)])
    assert await finder.search(X) == []
    await finder.activate("d", 1)
    await finder.upsert("d", 2, [vector("c", X)])
    assert [hit.id for hit in await finder.search(X)] == ["a", "b"]
    assert await finder.activate("d", 2) == 1
    assert [hit.id for hit in await finder.search(X)] == ["c"]
    assert await finder.activate("d", 2) == 1
    with pytest.raises(Conflict):
        await finder.activate("d", 1)
    with pytest.raises(Conflict):
        await finder.upsert("d", 1, [vector("late", X)])
    assert [hit.id for hit in await finder.search(X)] == ["c"]
    assert await finder.activate("empty", 1) == 0


async def test_writing_again_replaces(finder: Caller) -> None:
    """Upserts can be repeated and replace what had the same ids, in the active revision too."""
    for _ in range(2):
        assert await finder.upsert("d", 1, [vector("a", X), vector("b", Y)]) == 2
    assert await finder.activate("d", 1) == 2
    await finder.upsert("d", 1, [vector("b", Z, page="9")])
    assert dict((await finder.search(Z, limit=1))[0].metadata) == {"page": "9"}
    assert len(await finder.search(X)) == 2
    assert await finder.upsert("d", 1, []) == 0


async def test_concurrent_writers_and_activations_agree(finder: Caller) -> None:
    """Many writers of overlapping ids and many activations end with the latest revision seen."""
    batch = [vector(str(n), [n + 1.0, 1.0, 0.0]) for n in range(50)]
    await asyncio.gather(
        *(
            finder.upsert("d", revision, batch[:: 1 if n % 2 else -1])
            for n in range(4)
            for revision in (1, 2)
        )
    )
    outcomes = await asyncio.gather(
        *(finder.activate("d", 1 + n % 2) for n in range(8)), return_exceptions=True
    )
    assert all(outcome == 50 or isinstance(outcome, Conflict) for outcome in outcomes)
    hits = await finder.search(X, limit=1_000)
    assert len(hits) == 50
    assert {hit.revision for hit in hits} == {2}


async def test_deleting_removes_a_revision_or_all(finder: Caller) -> None:
    """One revision or the whole document goes, in every space, and the answer says how many."""
    await finder.space("t", 2)
    for revision in (1, 2):
        await finder.upsert("d", revision, [vector("a", X), vector("b", Y)])
    await finder.upsert("d", 1, [vector("a", [1.0, 0.0])], space="t")
    await finder.upsert("other", 1, [vector("o", X)])
    for document, revision in (("d", 2), ("other", 1)):
        await finder.activate(document, revision)
    assert await finder.delete_vectors("d", 1) == 3
    assert len(await finder.search(X)) == 3
    assert await finder.delete_vectors("d", 1) == 0
    assert await finder.delete_vectors("d") == 2
    assert [hit.id for hit in await finder.search(X)] == ["o"]
    # Nothing is left of it: its revisions begin anew.
    await finder.upsert("d", 1, [vector("a", X)])
    assert await finder.activate("d", 1) == 1
    assert await finder.delete_vectors("none") == 0


async def test_vectors_are_looked_up_by_the_hash_of_their_text(finder: Caller) -> None:
    """Hashes that are known answer their components in the order asked, active or not."""
    await finder.upsert("d", 1, [vector("a", [0.25, 0.5, -1.0], "ta"), vector("b", Y, "tb")])
    await finder.upsert("e", 1, [vector("a", [0.25, 0.5, -1.0], "ta")])
    known, other, none = (hashlib.sha256(t.encode()).digest() for t in ("ta", "tb", "tn"))

    async def lookup(*hashes: bytes, space: str = "s") -> Any:
        request = vpb.LookupVectorsRequest(space_id=space, text_sha256s=hashes)
        return (await finder.ask(finder.vectors.LookupVectors, request)).vectors

    found = await lookup(none, other, known, other)
    assert [v.text_sha256 for v in found] == [other, known]
    assert [list(v.values) for v in found] == [Y, [0.25, 0.5, -1.0]]
    assert finder.provenance.space_id == "s"
    for bad in ([b"short"], [bytes(32)] * 1_001):
        with pytest.raises(InvalidField):
            await lookup(*bad)
    with pytest.raises(NotFound):
        await lookup(known, space="none")


async def test_a_space_is_what_it_was_made_as(finder: Caller) -> None:
    """Ensuring a space again answers it; with any other property it is SPACE_MISMATCH."""
    await finder.space()
    for other in ({"dimensions": 4}, {"simulated": True}, {"provider": "o"}, {"model": "o"}):
        with pytest.raises(SpaceMismatch):
            await finder.space("s", **other)
    for bad in (
        {"dimensions": 0},
        {"dimensions": 4_001},
        {"dimensions": -1},
        {"space_id": ""},
        {"space_id": "a\0b"},
        {"space_id": "s" * 257},
        {"provider": "p" * 129},
        {"model": "m" * 257},
    ):
        with pytest.raises(InvalidField):
            await finder.space(**bad)
    await finder.space("largest", 4_000)
    values = np.ones(4_000)
    await finder.upsert("d", 1, [vector("a", values)], space="largest")
    await finder.activate("d", 1, space="largest")
    assert (await finder.search(values, space="largest"))[0].score == pytest.approx(1, abs=1e-3)


async def test_one_space_made_by_many_at_once_is_one(finder: Caller) -> None:
    """Any number of callers may ensure the same and other spaces at the same time."""
    await asyncio.gather(*(finder.space(f"new-{n % 3}", 2 + n % 3) for n in range(12)))
    for n in range(3):
        await finder.upsert("d", 1, [vector("a", [1.0] * (2 + n))], space=f"new-{n}")


async def test_simulated_and_genuine_never_mix(finder: Caller) -> None:
    """Simulated vectors are refused by a genuine space, to write and to search, and the reverse."""
    await finder.space("sim", simulated=True)
    await finder.upsert("d", 1, [vector("a", X)], space="sim", simulated=True)
    for space, simulated in (("s", True), ("sim", False)):
        with pytest.raises(SpaceMismatch):
            await finder.upsert("d", 1, [vector("a", X)], space=space, simulated=simulated)
        with pytest.raises(SpaceMismatch):
            await finder.search(X, space=space, simulated=simulated)


INCOMPARABLE: list[tuple[list[float], type[Exception]]] = [
    ([1.0, 0.0], SpaceMismatch),
    ([1.0, 0.0, 0.0, 0.0], SpaceMismatch),
    ([], SpaceMismatch),
    ([float("nan"), 0.0, 1.0], InvalidField),
    ([float("inf"), 0.0, 1.0], InvalidField),
    ([0.0, 0.0, 0.0], InvalidField),
    ([-0.0, 1e-9, 1e-38], InvalidField),
    ([65_505.0, 0.0, 0.0], InvalidField),
    ([0.0, -70_000.0, 0.0], InvalidField),
]


async def test_vectors_that_cannot_be_compared_are_refused(finder: Caller) -> None:
    """Wrong dimensions, components not finite, all zero or too large: nothing written or found."""
    for values, error in INCOMPARABLE:
        with pytest.raises(error):
            await finder.upsert("d", 1, [vector("good", X), vector("bad", values)])
        with pytest.raises(error):
            await finder.search(values)
        assert await finder.activate("d", 1) == 0


async def test_the_largest_components_are_kept(finder: Caller) -> None:
    """Components up to ±65,504 are within half precision and searchable."""
    await finder.upsert("d", 1, [vector("a", [65_504.0, -65_504.0, 65_504.0])])
    await finder.activate("d", 1)
    assert (await finder.search([1.0, -1.0, 1.0]))[0].score == pytest.approx(1, abs=1e-3)


BAD_UPSERTS: list[dict[str, Any]] = [
    {"collection": ""},
    {"collection": "c" * 129},
    {"collection": "a\0"},
    {"document_id": ""},
    {"document_id": "d" * 257},
    {"document_id": "a\nb"},
    {"revision": 0},
    {"revision": -1},
    {"vectors": [vector("", X)]},
    {"vectors": [vector("i" * 129, X)]},
    {"vectors": [vector("a\0", X)]},
    {"vectors": [vector("a", X), vector("a", Y)]},
    {"vectors": [vpb.Vector(id="a", values=X, text_sha256=b"short")]},
    {"vectors": [vpb.Vector(id="a", values=X, text_sha256=bytes(32), metadata={"": "x"})]},
    {"vectors": [vpb.Vector(id="a", values=X, text_sha256=bytes(32), metadata={"k": "\0"})]},
    {"vectors": [vector(str(n), X) for n in range(2_049)]},
]


async def test_bad_upserts_are_refused(finder: Caller) -> None:
    """Each fault of an upsert gets InvalidField naming its field, and nothing is written."""
    for change in BAD_UPSERTS:
        request = {
            "space_id": "s",
            "collection": "c",
            "document_id": "d",
            "revision": 1,
            "vectors": [vector("a", X)],
        }
        with pytest.raises(InvalidField) as refused:
            await finder.ask(
                finder.vectors.UpsertVectors, vpb.UpsertVectorsRequest(**{**request, **change})
            )
        assert refused.value.violations[0].subject.startswith(next(iter(change)))
        assert await finder.activate("d", 1) == 0


async def test_bad_searches_activations_and_deletions_are_refused(finder: Caller) -> None:
    """Limits, names and spaces that are none get their typed errors; the daemon goes on."""
    for bad in (
        {"limit": -1},
        {"limit": 1_001},
        {"collection": ""},
        {"filter": {"": "x"}},
        {"filter": {"k": "a\0b"}},
        {"filter": {str(n): "" for n in range(65)}},
    ):
        with pytest.raises(InvalidField):
            await finder.search(X, **bad)
    for doing in (
        finder.search(X, space="none"),
        finder.upsert("d", 1, [vector("a", X)], space="none"),
        finder.activate("d", 1, space="none"),
    ):
        with pytest.raises(NotFound):
            await doing
    for doing in (
        finder.search(X, space=""),
        finder.activate("d", 0),
        finder.activate("", 1),
        finder.delete_vectors(""),
        finder.delete_vectors("d", -1),
        finder.delete_vectors("d", collection=""),
    ):
        with pytest.raises(InvalidField):
            await doing
    assert await finder.search(X) == []


async def test_no_tenant_sees_anothers_vectors(
    finder: Caller, storage: Daemon, mesh: MeshSettings
) -> None:
    """Another tenant finds, looks up, activates and deletes nothing of this one's."""
    await finder.upsert("d", 2, [vector("a", X, "text")])
    await finder.activate("d", 2)
    async with calling_as(storage.address, mesh, "other", finder.provider) as other:
        assert await other.search(X) == []
        digest = hashlib.sha256(b"text").digest()
        request = vpb.LookupVectorsRequest(space_id="s", text_sha256s=[digest])
        assert not (await other.ask(other.vectors.LookupVectors, request)).vectors
        assert await other.delete_vectors("d") == 0
        assert await other.activate("d", 1) == 0
        await other.upsert("d", 1, [vector("a", Y)])
        assert [hit.revision for hit in await other.search(X)] == [1]
    assert [hit.revision for hit in await finder.search(X)] == [2]


async def test_row_security_hides_tenants_even_without_a_where(
    storage: Daemon, mesh: MeshSettings, database_url: str
) -> None:
    """As the daemon's role, no vector but the tenant's own is seen, and no partition at all."""
    async with calling_as(storage.address, mesh) as acme:
        await acme.space()
        await acme.upsert("d", 1, [vector("a", X)])
        await acme.activate("d", 1)
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "storage"})
    try:
        partition = await connection.fetchval(
            "SELECT inhrelid::regclass::text FROM pg_inherits JOIN pg_class ON oid = inhparent "
            "WHERE relname = 'vectors'"
        )
        unsafe = await connection.fetch(
            "SELECT relname FROM pg_class JOIN pg_attribute ON attrelid = pg_class.oid "
            "WHERE relnamespace = 'storage'::regnamespace AND relkind IN ('r', 'p') "
            "AND attname = 'tenant' AND NOT (relrowsecurity AND relforcerowsecurity)"
        )
        assert unsafe == []
        await connection.execute("SET ROLE tollgate_storage")
        for tenant, seen in (("acme", 1), ("other", 0), ("", 0)):
            await connection.execute("SELECT set_config('tollgate.tenant', $1, false)", tenant)
            for table in ("vectors", "revisions"):
                assert await connection.fetchval(f"SELECT count(*) FROM {table}") == seen
            assert await connection.execute("UPDATE vectors SET id = id") == f"UPDATE {seen}"
        for forbidden in (
            f"SELECT * FROM {partition}",
            f"DROP TABLE {partition}",
            "INSERT INTO revisions VALUES ('acme', 1, 'c', 'd', 9)",
            "UPDATE spaces SET simulated = true",
        ):
            await connection.execute("SELECT set_config('tollgate.tenant', 'other', false)")
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(forbidden)
    finally:
        await connection.close()


async def test_search_by_index_finds_what_exact_search_finds(mesh: MeshSettings) -> None:
    """With a large collection of others about, filters and tenants still get all their hits."""
    random = np.random.default_rng(7)
    centres = random.normal(size=(20, 16))

    def cloud(count: int) -> list[list[float]]:
        picked = centres[random.integers(20, size=count)]
        return [list(row) for row in picked + 0.3 * random.normal(size=picked.shape)]

    async def fill(caller: Caller, document: str, count: int) -> np.ndarray[Any, Any]:
        rows = cloud(count)
        vectors = [
            vector(str(n), row, f"{document}{n}", kind="rare" if n % 100 == 0 else "usual")
            for n, row in enumerate(rows)
        ]
        await caller.upsert(document, 1, vectors)
        await caller.activate(document, 1)
        return np.array(rows)

    # Every collection of more than 5 vectors is searched by index.
    settings = Settings(listen="127.0.0.1:0", exact_components_max=80)
    async with wire(mesh, settings) as daemon:
        async with (
            calling_as(daemon.address, mesh) as acme,
            calling_as(daemon.address, mesh, "small") as small,
        ):
            await acme.space(dimensions=16)
            rows = await fill(acme, "d", 2_000)
            # An inactive revision right beside everything, which no search may see.
            await acme.upsert("d", 2, [vector(str(n), row) for n, row in enumerate(rows)])
            own = await fill(small, "d", 20)
            found = 0
            for query in cloud(10):
                expected = _nearest(rows, query, 10)
                hits = await acme.search(query, limit=10)
                assert {hit.revision for hit in hits} == {1}
                assert [h.score for h in hits] == sorted((h.score for h in hits), reverse=True)
                found += len({int(hit.id) for hit in hits} & set(expected))
                rare = await acme.search(query, limit=20, filter={"kind": "rare"})
                assert sorted(int(hit.id) for hit in rare) == list(range(0, 2_000, 100))
                mine = await small.search(query, limit=20)
                assert [int(hit.id) for hit in mine][:3] == _nearest(own, query, 3)
                assert len(mine) == 20
                assert await acme.search(query, filter={"kind": "none"}) == []
            assert found >= 90


def _nearest(rows: np.ndarray[Any, Any], query: list[float], count: int) -> list[int]:
    halves = rows.astype(np.float16).astype(np.float64)
    cosines = halves @ np.array(query) / np.linalg.norm(halves, axis=1)
    return [int(n) for n in np.argsort(-cosines)[:count]]


async def test_a_search_by_index_uses_the_spaces_own_index(
    mesh: MeshSettings, database_url: str
) -> None:
    """The plan of a large collection's search is the HNSW index of its space, not a scan."""
    from services.storage.store import SEARCH_BY_INDEX, TUNE_SEARCH

    async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
        async with calling_as(daemon.address, mesh) as acme:
            for space in ("s", "t"):
                await acme.space(space)
                rows = [vector(str(n), [n, 1.0, 0.0]) for n in range(200)]
                await acme.upsert("d", 1, rows, space=space)
                await acme.activate("d", 1, space=space)
    connection = await asyncpg.connect(
        database_url, server_settings={"search_path": "storage, public"}
    )
    try:
        await connection.execute("SET ROLE tollgate_storage")
        await connection.execute("SELECT set_config('tollgate.tenant', 'acme', false)")
        number = await connection.fetchval("SELECT number FROM spaces WHERE id = 't'")
        sql = SEARCH_BY_INDEX.format(space=number, dimensions=3)
        async with connection.transaction():
            await connection.fetch(TUNE_SEARCH, "100", "1000")
            for name, value in (
                ("$1", "'acme'"),
                ("$2", "'c'"),
                ("$3", "'[1,2,3]'"),
                ("$4", "'{}'"),
                ("$5", "10"),
            ):
                sql = sql.replace(name, value)
            lines = await connection.fetch(f"EXPLAIN {sql}")
    finally:
        await connection.close()
    plan = "\n".join(line[0] for line in lines)
    assert f"vectors_{number}_nearest" in plan, plan
    assert "Sort" not in plan


async def test_vectors_and_spaces_outlive_the_daemon(mesh: MeshSettings) -> None:
    """What pgvector keeps is found after a restart, in the space as it was made."""
    settings = Settings(listen="127.0.0.1:0")
    async with wire(mesh, settings) as daemon, calling_as(daemon.address, mesh) as acme:
        await acme.space()
        await acme.upsert("d", 1, [vector("a", X)])
        await acme.activate("d", 1)
    async with wire(mesh, settings) as daemon, calling_as(daemon.address, mesh) as acme:
        assert [hit.id for hit in await acme.search(X)] == ["a"]
        with pytest.raises(SpaceMismatch):
            await acme.space(dimensions=4)


async def test_spaces_and_the_mocks_vectors_are_bounded(mesh: MeshSettings) -> None:
    """No more spaces than the setting says, and no more vectors in the mock's memory."""
    settings = Settings(listen="127.0.0.1:0", spaces_max=1, mock_vectors_max=2)
    async with wire(mesh, settings) as daemon:
        async with calling_as(daemon.address, mesh) as acme:
            await acme.space()
            with pytest.raises(InvalidField):
                await acme.space("more")
            await acme.space()
        async with calling_as(daemon.address, mesh, provider="mock") as acme:
            await acme.space()
            for _ in range(2):
                await acme.upsert("d", 1, [vector("a", X), vector("b", Y)])
            with pytest.raises(ProviderUnavailable):
                await acme.upsert("d", 1, [vector("c", X)])
