"""What storage promises of objects, asked of the real daemon on the real database."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit
from uuid import uuid4

import asyncpg
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from pydantic import SecretStr
from tollgate.storage.v1 import object_pb2 as pb

from chassis.errors import (
    AlreadyExists,
    Conflict,
    InvalidField,
    NotFound,
    ProviderUnavailable,
    TollgateError,
    Unauthenticated,
)
from chassis.postgres import migrate
from chassis.server import Daemon
from chassis.settings import MeshSettings
from services.storage.core import new_key
from services.storage.main import OBJECTS, Settings, wire
from services.storage.store import ROOM
from tests.storage.storage_caller import Caller, calling_as, vector

MIB = 1 << 20


def _files(mesh: MeshSettings) -> list[Path]:
    """Every file that the filesystem provider has, half-written ones too."""
    return [path for path in (mesh.state_dir / "objects").rglob("*") if path.is_file()]


async def _until_files(mesh: MeshSettings, count: int) -> None:
    async with asyncio.timeout(10):
        while len(_files(mesh)) != count:  # a directory has no event
            await asyncio.sleep(0.02)


async def test_an_object_comes_back_as_it_was_stored(acme: Caller) -> None:
    """Bytes, media type, metadata, size and SHA-256 of a large object survive a round trip."""
    chunks = [os.urandom(MIB) for _ in range(5)] + [b"", b"the end"]
    whole = b"".join(chunks)
    stored = await acme.put("a/b c/ü.bin", *chunks, content_type="x/y; z=1", metadata={"k": "v"})
    assert (stored.size_bytes, stored.sha256) == (len(whole), hashlib.sha256(whole).digest())
    assert acme.usage.bytes == len(whole)
    found, got = await acme.get("a/b c/ü.bin")
    assert found == stored
    assert (found.content_type, dict(found.metadata)) == ("x/y; z=1", {"k": "v"})
    assert b"".join(got) == whole
    assert max(map(len, got)) <= 256 << 10
    assert (await acme.ask(acme.objects.StatObject, _named("a/b c/ü.bin"))).object == stored


def _named(name: str, bucket: str = "docs") -> pb.StatObjectRequest:
    return pb.StatObjectRequest(bucket=bucket, name=name)


async def test_every_answer_says_what_it_used_and_whence_it_came(acme: Caller) -> None:
    """Usage counts the object's real bytes and one request; provenance names the provider."""
    expected = (acme.provider, acme.provider == "mock")

    async def check(size: int) -> None:
        assert (acme.provenance.provider, acme.provenance.simulated) == expected
        assert (acme.usage.requests, acme.usage.bytes) == (1, size)

    await acme.put("a", b"12345", max_bytes=1_000)
    await check(5)
    await acme.read("a", offset=1, limit=3)
    await check(3)
    objects = acme.objects
    for method, request in (
        (objects.CreateBucket, pb.CreateBucketRequest(bucket="more")),
        (objects.ListBuckets, pb.ListBucketsRequest()),
        (objects.StatObject, _named("a")),
        (objects.ListObjects, pb.ListObjectsRequest(bucket="docs")),
        (objects.CopyObject, pb.CopyObjectRequest(bucket="docs", name="a", to_name="b")),
        (objects.MoveObject, pb.MoveObjectRequest(bucket="docs", name="b", to_name="c")),
        (objects.DeleteObjects, pb.DeleteObjectsRequest(bucket="docs", names=["c"])),
        (objects.DeleteBucket, pb.DeleteBucketRequest(bucket="more")),
    ):
        await acme.ask(method, request)
        await check(0)


@pytest.mark.parametrize("size", [0, 1, (256 << 10) - 1, (256 << 10) + 1])
async def test_ranges(acme: Caller, size: int) -> None:
    """Every range within the object reads exactly its bytes; one that begins beyond is refused."""
    data = os.urandom(size)
    await acme.put("a", data)
    for offset in {0, min(1, size), size // 2, size}:
        for limit in {0, 1, size, size + 7, 1 << 62}:
            expected = data[offset : offset + limit] if limit else data[offset:]
            assert await acme.read("a", offset=offset, limit=limit) == expected
    for offset, limit in ((size + 1, 0), (-1, 0), (0, -1), (1 << 62, 1)):
        with pytest.raises(InvalidField):
            await acme.read("a", offset=offset, limit=limit)


BAD_NAMES = [
    "",
    "..",
    ".",
    "../../etc/passwd",
    "a/../b",
    "a/./b",
    "a/..",
    "/etc/passwd",
    "a/",
    "/",
    "a\0b",
    "a\nb",
    "a\x7fb",
    "a\x85b",
    "n" * 1_025,
    "é" * 513,
    "n" * 1_000_000,
]


async def test_bad_names_are_refused_everywhere(acme: Caller) -> None:
    """A name that is none gets InvalidField from every call that takes one, and nothing is kept."""
    objects = acme.objects
    await acme.put("good", b"x")
    for name in BAD_NAMES:
        for doing in (
            acme.put(name, b"x"),
            acme.read(name),
            acme.ask(objects.StatObject, _named(name)),
            acme.ask(
                objects.CopyObject, pb.CopyObjectRequest(bucket="docs", name="good", to_name=name)
            ),
            acme.ask(
                objects.MoveObject, pb.MoveObjectRequest(bucket="docs", name=name, to_name="b")
            ),
            acme.ask(
                objects.MoveObject, pb.MoveObjectRequest(bucket="docs", name="good", to_name=name)
            ),
            acme.ask(objects.DeleteObjects, pb.DeleteObjectsRequest(bucket="docs", names=[name])),
        ):
            with pytest.raises(InvalidField):
                await doing
        assert await acme.names() == ["good"]


ODD_NAMES = ["a\\..\\b", "...", "..a", "a//b", "%2e%2e/x", "C:\\x", " ", "#1", "n" * 1_024, "𐍈/ö"]


async def test_odd_names_are_names(acme: Caller) -> None:
    """What looks odd but is allowed is stored and found under that very name."""
    for name in ODD_NAMES:
        await acme.put(name, name.encode())
        assert await acme.read(name) == name.encode()
    assert await acme.names() == sorted(ODD_NAMES)


async def test_names_that_hold_one_another_live_together(acme: Caller) -> None:
    """`a` and `a/b` are two objects, whatever a file system would say."""
    await acme.put("a", b"1")
    await acme.put("a/b", b"2")
    assert (await acme.read("a"), await acme.read("a/b")) == (b"1", b"2")


BAD_BUCKETS = ["", "ab", "a" * 64, "Docs", "a_b", "../x", "döcs", "docs\n"]


async def test_bad_buckets_are_refused(acme: Caller) -> None:
    """A bucket's name that is none gets InvalidField."""
    for bucket in BAD_BUCKETS:
        for doing in (acme.bucket(bucket), acme.put("a", b"x", bucket=bucket), acme.names(bucket)):
            with pytest.raises(InvalidField):
                await doing


BAD_HEADERS: list[dict[str, Any]] = [
    {"max_bytes": -1},
    {"max_bytes": (64 << 20) + 1},
    {"content_type": "html"},
    {"content_type": "a/b\nc"},
    {"content_type": "a/" + "b" * 300},
    {"metadata": {"": "x"}},
    {"metadata": {"k": "a\0b"}},
    {"metadata": {"k": "v" * 2_048}},
    {"metadata": {str(n): "" for n in range(65)}},
    {"if_etag": "x" * 129},
    {"if_etag": "x", "if_absent": True},
]


async def test_bad_headers_are_refused(acme: Caller) -> None:
    """Each fault of a header gets InvalidField naming its field, and nothing is kept."""
    for header in BAD_HEADERS:
        with pytest.raises(InvalidField) as refused:
            await acme.put("a", b"x", **header)
        field = refused.value.violations[0].subject.removeprefix("header.")
        assert field in {*header, "if_absent"}
        assert await acme.names() == []


async def test_a_bad_upload_is_refused(acme: Caller, mesh: MeshSettings) -> None:
    """No header, two, an empty message, too large a chunk: InvalidField, and nothing is kept."""
    header = pb.PutObjectRequest(
        header=pb.PutObjectHeader(bucket="docs", name="a", max_bytes=4 * MIB)
    )
    data = pb.PutObjectRequest(data=b"x")
    for messages in (
        [],
        [data],
        [pb.PutObjectRequest()],
        [header, data, header],
        [header, data, pb.PutObjectRequest()],
        [header, pb.PutObjectRequest(data=bytes(MIB + 1))],
    ):
        with pytest.raises(InvalidField):
            await acme.upload(*messages)
    assert await acme.names() == []
    await _until_files(mesh, 0)


async def test_more_than_declared_is_refused(acme: Caller, mesh: MeshSettings) -> None:
    """An upload beyond max_bytes is refused, leaves nothing, and what was there stays."""
    await acme.put("a", b"before")
    files = len(_files(mesh))
    for chunks, most in (((b"12", b"3"), 2), ([bytes(MIB)] * 6, 5 * MIB), ((b"1",), 0)):
        with pytest.raises(InvalidField) as refused:
            await acme.put("a", *chunks, max_bytes=most)
        assert refused.value.violations[0].subject == "header.max_bytes"
    assert await acme.read("a") == b"before"
    await _until_files(mesh, files)


async def test_what_is_not_there_is_not_found(acme: Caller) -> None:
    """Calls on a missing bucket or object get NotFound and name it."""
    objects = acme.objects
    await acme.put("good", b"x")
    copy = pb.CopyObjectRequest(bucket="docs", name="good", to_bucket="none", to_name="x")
    move = pb.MoveObjectRequest(bucket="docs", name="good", to_bucket="none", to_name="x")
    for doing, subject in (
        (acme.put("a", b"x", bucket="none"), "bucket/none"),
        (acme.read("a"), "object/docs/a"),
        (acme.read("a", bucket="none"), "bucket/none"),
        (acme.ask(objects.StatObject, _named("a")), "object/docs/a"),
        (acme.names("none"), "bucket/none"),
        (acme.ask(objects.CopyObject, copy), "bucket/none"),
        (acme.ask(objects.MoveObject, move), "bucket/none"),
        (acme.ask(objects.DeleteBucket, pb.DeleteBucketRequest(bucket="none")), "bucket/none"),
        (acme.ask(objects.DeleteObjects, pb.DeleteObjectsRequest(bucket="none")), "bucket/none"),
    ):
        with pytest.raises(NotFound) as refused:
            await doing
        assert refused.value.violations[0].subject == subject
    assert await acme.names() == ["good"]


async def test_conditions_of_a_write(acme: Caller) -> None:
    """if_absent and if_etag hold against what is there; a read can ask for an etag too."""
    first = await acme.put("a", b"1", if_absent=True)
    with pytest.raises(AlreadyExists):
        await acme.put("a", b"2", if_absent=True)
    second = await acme.put("a", b"2", if_etag=first.etag)
    assert second.etag != first.etag
    for name, etag in (("a", first.etag), ("gone", first.etag)):
        with pytest.raises(Conflict):
            await acme.put(name, b"3", if_etag=etag)
    with pytest.raises(Conflict):
        await acme.read("a", if_etag=first.etag)
    assert await acme.read("a", if_etag=second.etag) == b"2"


async def test_lists_come_in_order_of_bytes_page_by_page(acme: Caller) -> None:
    """Pages join to all names with the prefix in order of their bytes, each once."""
    names = ["a", "a/1", "a/2", "a0", "B", "b", "é", "z", "\uffff", "😀", "a/\U0010ffff", "a/é"]
    for name in names:
        await acme.put(name, b"x")
    for prefix in ("", "a", "a/", "é", "none", "a/\U0010ffff"):
        for size in (1, 2, 5, 1_000):
            found, token = list[str](), ""
            while True:
                answer = await acme.ask(
                    acme.objects.ListObjects,
                    pb.ListObjectsRequest(
                        bucket="docs", prefix=prefix, page_size=size, page_token=token
                    ),
                )
                assert len(answer.objects) <= size
                found += [one.name for one in answer.objects]
                token = answer.next_page_token
                if not token:
                    break
            expected = [name for name in names if name.startswith(prefix)]
            assert found == sorted(expected, key=lambda name: name.encode())


async def test_buckets_are_listed_and_deleted_when_empty(acme: Caller) -> None:
    """Creating twice is one bucket; pages join in order; a bucket with objects stays."""
    for name in ("b-2", "b-1", "b-1", "b-3"):
        await acme.bucket(name)
    pages, token = list[str](), ""
    while True:
        request = pb.ListBucketsRequest(page_size=3, page_token=token)
        answer = await acme.ask(acme.objects.ListBuckets, request)
        pages += [bucket.name for bucket in answer.buckets]
        token = answer.next_page_token
        if not token:
            break
    assert pages == ["b-1", "b-2", "b-3", "docs"]
    await acme.put("a", b"x")
    delete = pb.DeleteBucketRequest(bucket="docs")
    with pytest.raises(Conflict):
        await acme.ask(acme.objects.DeleteBucket, delete)
    await acme.ask(acme.objects.DeleteObjects, pb.DeleteObjectsRequest(bucket="docs", names=["a"]))
    await acme.ask(acme.objects.DeleteBucket, delete)
    with pytest.raises(NotFound):
        await acme.ask(acme.objects.DeleteBucket, delete)


async def test_page_tokens_from_elsewhere_are_refused(
    acme: Caller, storage: Daemon, mesh: MeshSettings
) -> None:
    """A token of another list, bucket or tenant, and one that is made up, get InvalidField."""
    await acme.bucket("other")
    for name in ("a", "b"):
        await acme.put(name, b"x")
        await acme.put(name, b"x", bucket="other")

    def listing(token: str, bucket: str = "docs", prefix: str = "", size: int = 1) -> object:
        return pb.ListObjectsRequest(bucket=bucket, prefix=prefix, page_size=size, page_token=token)

    objects = acme.objects
    token = (await acme.ask(objects.ListObjects, listing(""))).next_page_token
    buckets = (
        await acme.ask(objects.ListBuckets, pb.ListBucketsRequest(page_size=1))
    ).next_page_token
    assert (await acme.ask(objects.ListObjects, listing(token))).objects[0].name == "b"
    for request in (
        listing(token, bucket="other"),
        listing(token, prefix="a"),
        listing(buckets),
        listing("YQ=="),
        listing("é"),
        listing("x" * 100_000),
        listing("", size=-1),
        listing("", size=1_001),
    ):
        with pytest.raises(InvalidField):
            await acme.ask(objects.ListObjects, request)
    with pytest.raises(InvalidField):
        await acme.ask(objects.ListBuckets, pb.ListBucketsRequest(page_token=token))
    async with calling_as(storage.address, mesh, "other", acme.provider) as other:
        await other.bucket()
        with pytest.raises(InvalidField):
            await other.ask(other.objects.ListObjects, listing(token))


async def test_copies_and_moves(acme: Caller, mesh: MeshSettings) -> None:
    """A copy lives on its own, a move keeps the bytes, both replace what had the name."""
    await acme.bucket("other")
    source = await acme.put("a", b"one", content_type="x/y", metadata={"k": "v"})
    await acme.put("b", b"two")
    copy = pb.CopyObjectRequest(bucket="docs", name="a", to_name="b")
    copied = (await acme.ask(acme.objects.CopyObject, copy)).object
    assert copied.etag != source.etag
    assert (copied.content_type, copied.sha256) == ("x/y", source.sha256)
    assert dict(copied.metadata) == {"k": "v"}
    await acme.put("a", b"three")
    assert await acme.read("b") == b"one"
    move = pb.MoveObjectRequest(bucket="docs", name="b", to_bucket="other", to_name="c/d")
    moved = (await acme.ask(acme.objects.MoveObject, move)).object
    assert (moved.bucket, moved.name, moved.sha256) == ("other", "c/d", source.sha256)
    assert await acme.read("c/d", bucket="other") == b"one"
    back = pb.MoveObjectRequest(bucket="other", name="c/d", to_bucket="docs", to_name="a")
    await acme.ask(acme.objects.MoveObject, back)
    assert await acme.read("a") == b"one"
    with pytest.raises(NotFound):
        await acme.ask(acme.objects.MoveObject, move)
    with pytest.raises(InvalidField):
        await acme.ask(
            acme.objects.CopyObject, pb.CopyObjectRequest(bucket="docs", name="a", to_name="a")
        )
    assert await acme.names() == ["a"]
    if acme.provider == "filesystem":
        await _until_files(mesh, 1)


async def test_deleting_says_what_there_was(acme: Caller, mesh: MeshSettings) -> None:
    """Deleting answers what was and what was not there, can be repeated, and frees the bytes."""
    for name in ("a", "b", "c"):
        await acme.put(name, b"x")
    request = pb.DeleteObjectsRequest(bucket="docs", names=["c", "nope", "a", "c"])
    answer = await acme.ask(acme.objects.DeleteObjects, request)
    assert (answer.deleted, answer.missing) == (["c", "a"], ["nope"])
    answer = await acme.ask(acme.objects.DeleteObjects, request)
    assert (answer.deleted, answer.missing) == ([], ["c", "nope", "a"])
    assert await acme.names() == ["b"]
    if acme.provider == "filesystem":
        await _until_files(mesh, 1)
    many = pb.DeleteObjectsRequest(bucket="docs", names=map(str, range(1_001)))
    with pytest.raises(InvalidField):
        await acme.ask(acme.objects.DeleteObjects, many)


async def test_concurrent_writes_to_one_name_leave_one_whole(
    acme: Caller, mesh: MeshSettings
) -> None:
    """Of many writers to one name one wins, wholly; of many that want it absent just one does."""
    bodies = [bytes([n]) * (MIB + n) for n in range(8)]
    await asyncio.gather(*(acme.put("a", body[:MIB], body[MIB:]) for body in bodies))
    assert await acme.read("a") in bodies
    outcomes = await asyncio.gather(
        *(acme.put("b", body[:MIB], if_absent=True) for body in bodies), return_exceptions=True
    )
    assert sum(isinstance(outcome, pb.Object) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == 7
    if acme.provider == "filesystem":
        await _until_files(mesh, 2)


async def test_writes_moves_and_deletions_at_once_keep_rows_and_bytes_one(
    acme: Caller, mesh: MeshSettings
) -> None:
    """Whatever the order, every name that is listed can be read and no bytes are left over."""
    names = ["a", "b", "c"]

    async def move(source: str, target: str) -> None:
        request = pb.MoveObjectRequest(bucket="docs", name=source, to_name=target)
        await acme.ask(acme.objects.MoveObject, request)

    async def copy(source: str, target: str) -> None:
        request = pb.CopyObjectRequest(bucket="docs", name=source, to_name=target)
        await acme.ask(acme.objects.CopyObject, request)

    async def delete(name: str) -> None:
        request = pb.DeleteObjectsRequest(bucket="docs", names=[name, "a"])
        await acme.ask(acme.objects.DeleteObjects, request)

    pairs = [(one, other) for one in names for other in names if one != other]
    work: list[Coroutine[Any, Any, object]] = [
        acme.put(name, name.encode() * 9) for name in names * 6
    ]
    work += [doing(*pair) for pair in pairs * 4 for doing in (move, copy)]
    work += [delete(name) for name in names]
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    assert {type(o) for o in outcomes if isinstance(o, BaseException)} <= {NotFound}
    left = await acme.names()
    for name in left:
        assert len(await acme.read(name)) == 9
    if acme.provider == "filesystem":
        await _until_files(mesh, len(left))


async def test_a_cancelled_upload_leaves_nothing(acme: Caller, mesh: MeshSettings) -> None:
    """An upload whose caller goes away in the middle leaves no object and no bytes."""
    sent = asyncio.Event()

    async def requests() -> AsyncIterator[pb.PutObjectRequest]:
        header = pb.PutObjectHeader(bucket="docs", name="a", max_bytes=64 * MIB)
        yield pb.PutObjectRequest(header=header)
        for _ in range(8):
            yield pb.PutObjectRequest(data=bytes(MIB))
        sent.set()
        await asyncio.Event().wait()

    upload = acme.objects.PutObject(requests(), metadata=acme.metadata)
    await sent.wait()
    if acme.provider == "filesystem":
        await _until_files(mesh, 1)
    upload.cancel()
    await _until_files(mesh, 0)
    assert await acme.names() == []
    # The memory that it took is free again: the mock has 32 MiB in all.
    for name in "bc":
        await acme.put(name, *[bytes(MIB)] * 14)


async def test_a_download_survives_a_replacement(acme: Caller) -> None:
    """Who began to read goes on to read what it began, though the object is replaced meanwhile."""
    await acme.put("a", *[b"1" * MIB] * 8)
    request = pb.GetObjectRequest(bucket="docs", name="a")
    messages = aiter(acme.objects.GetObject(request, metadata=acme.metadata))
    assert (await anext(messages)).object.size_bytes == 8 * MIB
    await acme.put("a", b"2")
    rest = b"".join([message.data async for message in messages])
    assert rest == b"1" * 8 * MIB
    assert await acme.read("a") == b"2"


async def test_no_tenant_sees_anothers_objects(
    acme: Caller, storage: Daemon, mesh: MeshSettings
) -> None:
    """The same names are other objects for another tenant, who can list, read or delete none."""
    await acme.put("a", b"acme's")
    async with calling_as(storage.address, mesh, "other", acme.provider) as other:
        with pytest.raises(NotFound):
            await other.read("a")
        await other.bucket()
        assert await other.names() == []
        with pytest.raises(NotFound):
            await other.read("a")
        await other.put("a", b"other's")
        request = pb.DeleteObjectsRequest(bucket="docs", names=["a"])
        await other.ask(other.objects.DeleteObjects, request)
    assert await acme.read("a") == b"acme's"


async def test_row_security_hides_tenants_even_without_a_where(
    acme: Caller, storage: Daemon, mesh: MeshSettings, database_url: str
) -> None:
    """As the daemon's role, no rows but the tenant's own are seen, changed or written."""
    await acme.put("a", b"acme's")
    connection = await asyncpg.connect(database_url, server_settings={"search_path": "storage"})
    try:
        kept = await connection.fetchval("SELECT count(*) FROM objects")
        assert kept == (acme.provider == "filesystem")
        await connection.execute("SET ROLE tollgate_storage")
        for tenant, seen in (("acme", kept), ("other", 0), ("", 0)):
            await connection.execute("SELECT set_config('tollgate.tenant', $1, false)", tenant)
            for table in ("objects", "buckets"):
                assert await connection.fetchval(f"SELECT count(*) FROM {table}") == seen
            assert await connection.execute("UPDATE objects SET etag = etag") == f"UPDATE {seen}"
        await connection.execute("SELECT set_config('tollgate.tenant', 'other', false)")
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await connection.execute("INSERT INTO buckets VALUES ('acme', 'filesystem', 'mine')")
    finally:
        await connection.close()


async def test_bytes_that_no_object_names_are_swept(mesh: MeshSettings) -> None:
    """What crashes left behind goes at the next start; young bytes and named bytes stay."""
    directory = mesh.state_dir / "objects"
    long_ago = time.time() - 7_200
    async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
        async with calling_as(daemon.address, mesh) as acme:
            await acme.bucket()
            await acme.put("a", b"named")
    named = _files(mesh)[0]
    old = f"{int(long_ago * 1e9):016x}{'0' * 16}"
    # An old file of a young key is a copy, or a long upload, about to be named.
    for name in (old, f"{old}#1", new_key(), new_key() + "#1"):
        file = directory / name.partition("#")[0][-2:] / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(b"left")
        os.utime(file, (long_ago, long_ago))
    renamed = directory / named.parent.name / "not-ours"
    renamed.write_bytes(b"x")
    os.utime(renamed, (long_ago, long_ago))
    async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
        await _until_files(mesh, 4)
        assert not (directory / "00" / old).exists()
        async with calling_as(daemon.address, mesh) as acme:
            assert await acme.read("a") == b"named"


async def test_a_named_blob_is_never_swept(mesh: MeshSettings) -> None:
    """However old, bytes that an object of any tenant names are kept, copies among them."""
    settings = Settings(listen="127.0.0.1:0", sweep_age_s=1, sweep_s=0.05)
    async with wire(mesh, settings) as daemon:
        for tenant in ("acme", "other"):
            async with calling_as(daemon.address, mesh, tenant) as caller:
                await caller.bucket()
                await caller.put("a", b"x")
                copy = pb.CopyObjectRequest(bucket="docs", name="a", to_name="b")
                await caller.ask(caller.objects.CopyObject, copy)
        left = mesh.state_dir / "objects" / "00" / f"{'0' * 32}"
        left.parent.mkdir(exist_ok=True)
        left.write_bytes(b"x")
        await _until_files(mesh, 4)
        async with calling_as(daemon.address, mesh) as acme:
            assert await acme.read("b") == b"x"


async def test_objects_outlive_the_daemon(mesh: MeshSettings) -> None:
    """What the filesystem provider stored is there after a restart."""
    settings = Settings(listen="127.0.0.1:0")
    async with wire(mesh, settings) as daemon, calling_as(daemon.address, mesh) as acme:
        await acme.bucket()
        await acme.put("a", b"x")
    async with wire(mesh, settings) as daemon, calling_as(daemon.address, mesh) as acme:
        assert await acme.read("a") == b"x"


async def test_storage_works_through_a_transaction_pooler(mesh: MeshSettings) -> None:
    """Where sessions are no one's own, objects and vectors work all the same."""
    mesh = mesh.model_copy(update={"database_pooled": True})
    async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
        async with calling_as(daemon.address, mesh) as acme:
            await acme.bucket()
            stored = await acme.put("a", b"x")
            assert stored.content_type == "application/octet-stream"
            assert await acme.read("a") == b"x"
            await acme.space()
            for revision in (1, 2):
                await acme.upsert("d", revision, [vector("a", [1.0, 0.0, 0.0])])
            await acme.activate("d", 2)
            assert [hit.revision for hit in await acme.search([1.0, 1.0, 0.0])] == [2]


async def test_an_ordinary_owner_of_the_database_is_enough(
    mesh: MeshSettings, database_url: str
) -> None:
    """Where a superuser made the extension, tables of an owner who is none serve all the same."""
    login, parts = f"owner_{uuid4().hex[:12]}", urlsplit(database_url)
    url = urlunsplit(parts._replace(netloc=f"{login}:secret@{parts.hostname}:{parts.port}"))
    connection = await asyncpg.connect(database_url)
    try:
        await migrate(database_url, room=ROOM, directory=mesh.state_dir)  # Makes the role.
        await connection.execute("DROP SCHEMA storage CASCADE")
        await connection.execute("CREATE EXTENSION vector SCHEMA public")
        await connection.execute(f"CREATE ROLE {login} LOGIN PASSWORD 'secret'")
        await connection.execute(f"GRANT tollgate_storage TO {login}")
        await connection.execute(f"ALTER DATABASE {parts.path[1:]} OWNER TO {login}")
        mesh = mesh.model_copy(update={"database_url": SecretStr(url)})
        async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
            async with calling_as(daemon.address, mesh) as acme:
                await acme.bucket()
                await acme.put("a", b"x")
                with pytest.raises(NotFound):
                    await acme.put("a", b"x", bucket="none")
                request = pb.DeleteBucketRequest(bucket="docs")
                with pytest.raises(Conflict):
                    await acme.ask(acme.objects.DeleteBucket, request)
                await acme.space()
                await acme.upsert("d", 1, [vector("a", [1.0, 0.0, 0.0])])
                await acme.activate("d", 1)
                assert [hit.id for hit in await acme.search([1.0, 1.0, 0.0])] == ["a"]
    finally:
        await connection.execute(f"REASSIGN OWNED BY {login} TO CURRENT_USER")
        await connection.execute(f"DROP OWNED BY {login}")
        await connection.execute(f"DROP ROLE {login}")
        await connection.close()


async def test_a_disk_that_refuses_is_unavailable_and_names_no_path(
    storage: Daemon, mesh: MeshSettings, caplog: pytest.LogCaptureFixture
) -> None:
    """When the directory cannot be used, calls get ProviderUnavailable and no path gets out."""
    async with calling_as(storage.address, mesh) as acme:
        await acme.bucket()
        await acme.put("a", b"x")
        shutil.rmtree(mesh.state_dir / "objects")
        (mesh.state_dir / "objects").write_bytes(b"in the way")
        copy = pb.CopyObjectRequest(bucket="docs", name="a", to_name="b")
        for doing in (
            acme.put("b", b"x"),
            acme.put("b", *[bytes(MIB)] * 3),
            acme.read("a"),
            acme.ask(acme.objects.CopyObject, copy),
        ):
            with pytest.raises(ProviderUnavailable) as refused:
                await doing
            assert str(mesh.state_dir) not in str(refused.value)
        assert await acme.names() == ["a"]
    assert str(mesh.state_dir / "objects") not in caplog.text


async def test_a_full_disk_is_unavailable(mesh: MeshSettings) -> None:
    """Below the free space that must remain nothing is written; reading goes on."""
    async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
        async with calling_as(daemon.address, mesh) as acme:
            await acme.bucket()
            await acme.put("a", b"x")
    settings = Settings(listen="127.0.0.1:0", free_bytes_min=1 << 60)
    async with wire(mesh, settings) as daemon, calling_as(daemon.address, mesh) as acme:
        with pytest.raises(ProviderUnavailable, match="full"):
            await acme.put("b", b"x")
        assert await acme.names() == ["a"]
        assert await acme.read("a") == b"x"


async def test_the_mocks_memory_is_bounded(storage: Daemon, mesh: MeshSettings) -> None:
    """The mock refuses what its memory cannot take, and takes more when some was freed."""
    async with calling_as(storage.address, mesh, provider="mock") as acme:
        await acme.bucket()
        await acme.put("a", *[bytes(MIB)] * 30)
        with pytest.raises(ProviderUnavailable):
            await acme.put("b", *[bytes(MIB)] * 4)
        request = pb.DeleteObjectsRequest(bucket="docs", names=["a"])
        await acme.ask(acme.objects.DeleteObjects, request)
        await acme.put("b", *[bytes(MIB)] * 30)


async def test_calls_without_identity_or_with_an_unknown_provider_are_refused(
    storage: Daemon, mesh: MeshSettings
) -> None:
    """No identity is Unauthenticated; a provider that serves no objects is InvalidField."""
    async with calling_as(storage.address, mesh) as nobody:
        nobody.metadata = ()  # type: ignore[assignment]  # on purpose
        with pytest.raises(Unauthenticated):
            await nobody.names()
    for name in ("s3", "pgvector", "../mock"):
        async with calling_as(storage.address, mesh, provider=name) as acme:
            with pytest.raises(InvalidField):
                await acme.names()


async def test_health_names_every_provider(storage: Daemon, mesh: MeshSettings) -> None:
    """Health knows the services and each provider of each, found in the folder."""
    async with calling_as(storage.address, mesh) as caller:
        health: Any = health_pb2_grpc.HealthStub(caller.channel)  # Its types know no methods.
        for name in (OBJECTS, f"{OBJECTS}/filesystem", f"{OBJECTS}/mock"):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_the_database_going_away_is_unavailable(
    mesh: MeshSettings, database_url: str
) -> None:
    """While the database cannot be had calls get a typed error; when it is back, answers."""
    parts = urlsplit(database_url)
    assert parts.hostname is not None
    assert parts.port is not None
    cable = _Cable(parts.hostname, parts.port)
    await cable.plug()
    here = parts._replace(netloc=parts.netloc.replace(f":{parts.port}", f":{cable.port}"))
    mesh = mesh.model_copy(update={"database_url": SecretStr(urlunsplit(here))})
    async with wire(mesh, Settings(listen="127.0.0.1:0")) as daemon:
        async with calling_as(daemon.address, mesh) as acme:
            await acme.bucket()
            await acme.put("a", b"x")
            await cable.unplug()
            for doing in (acme.names(), acme.put("b", b"x"), acme.space(), acme.read("a")):
                with pytest.raises(ProviderUnavailable) as refused:
                    await doing
                assert str(cable.port) not in str(refused.value)
            await cable.plug()
            assert await _soon(acme) == ["a"]
        await cable.unplug()


class _Cable:
    """The way to the database, which can be cut."""

    def __init__(self, host: str, port: int) -> None:
        self._end = (host, port)
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def plug(self) -> None:
        self._server = await asyncio.start_server(self._join, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def unplug(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(*self._end)
        self._writers |= {writer, other_writer}
        await asyncio.gather(self._copy(reader, other_writer), self._copy(other_reader, writer))

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        except OSError:
            pass
        finally:
            writer.close()


async def _soon(acme: Caller) -> list[str]:
    for _ in range(50):
        try:
            return await acme.names()
        except TollgateError:
            await asyncio.sleep(0.05)
    raise AssertionError("storage did not come back")
