"""What a worker process can and cannot do, seen from outside and by lying to the pool."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from chassis.errors import DocumentUnreadable, ProviderUnavailable
from services.parser.sandbox import pool as pools
from services.parser.sandbox.frames import Kind
from services.parser.sandbox.pool import Pool, PoolBounds, Request
from tests.parser import documents
from tests.parser.conftest import gone, runs, worker_pids

MIB = documents.MIB
BOUNDS = PoolBounds(
    workers=1,
    waiting_max=8,
    document_timeout_s=20.0,
    stall_timeout_s=20.0,
    memory_bytes=512 * MIB,
    resident_bytes_max=256 * MIB,
    documents_per_worker=100,
    document_bytes_max=8 * MIB,
    answer_bytes_max=64 * MIB,
)


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    """A pool of one worker."""
    started = Pool(BOUNDS)
    await started.start()
    try:
        yield started
    finally:
        await started.stop()


REPORT = """
import os, sys
sys.path.extend(sys.argv[2:])
from services.parser.sandbox.frames import HEAD, SIZE, Frame, Kind, encode
os.write(1, encode(Frame(Kind.READY)))
os.read(0, 100_000)
opened = []
for fd in range(1000):
    try:
        opened.append(f"{fd} {os.readlink(f'/proc/self/fd/{fd}')}")
    except OSError:
        pass
os.write(1, encode(Frame(Kind.OPENED, 1)))
os.write(1, encode(Frame(Kind.PAGE, 1, chr(10).join(os.environ), chr(10).join(opened))))
os.write(1, encode(Frame(Kind.DONE)))
"""


async def test_worker_inherits_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker starts with an empty environment, two pipes, and no file or socket of ours."""
    monkeypatch.setenv("TOLLGATE_MESH_SECRET", "hidden")
    monkeypatch.setattr(pools, "BOOT", REPORT)
    pool = Pool(BOUNDS)
    await pool.start()
    try:
        frames = [frame async for frame in pool.answers(Request(Kind.PARSE, b"text"))]
    finally:
        await pool.stop()
    assert set(frames[1].first.split()) <= {"LC_CTYPE"}  # Python's own doing
    opened = dict(line.split(" ", 1) for line in frames[1].second.splitlines())
    assert opened.keys() == {"0", "1", "2"}
    assert opened["2"] == "/dev/null"


async def test_worker_is_limited(pool: Pool) -> None:
    """A worker can write no file, dump no core, start no process and open few files."""
    limits = _limits(pool.pids()[0])
    assert limits["Max file size"] == ["0", "0"]
    assert limits["Max core file size"] == ["0", "0"]
    assert limits["Max processes"] == ["0", "0"]
    assert limits["Max open files"] == ["16", "16"]
    most = BOUNDS.memory_bytes + 3 * BOUNDS.document_bytes_max
    assert limits["Max address space"] == [str(BOUNDS.memory_bytes), str(most)]


def _limits(pid: int) -> dict[str, list[str]]:
    """A process's limits, soft and hard, as the system lists them."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:].split()[:2] for line in lines}


async def test_worker_of_root_is_nobody(pool: Pool) -> None:
    """Where the daemon is root, its workers are not."""
    (pid,) = pool.pids()
    status = _status(pid)
    users = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
    if os.getuid() == 0:
        assert set(users) == {"65534"}
    assert "NoNewPrivs:\t1" in status


def _status(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


async def test_pool_ends_with_its_workers(pool: Pool) -> None:
    """Stopping the pool leaves no process behind."""
    assert worker_pids() == pool.pids() != []
    await pool.stop()
    assert worker_pids() == []


def test_workers_end_with_a_killed_daemon(tmp_path: Path) -> None:
    """A daemon killed with SIGKILL leaves no worker behind, not even one that hangs."""
    settings = {
        "TOLLGATE_STATE_DIR": str(tmp_path),
        "TOLLGATE_PARSER_LISTEN": f"unix:{tmp_path}/parser.sock",
        "TOLLGATE_PARSER_LOCAL_WORKERS": "2",
    }
    command = [sys.executable, "-m", "services.parser.main"]
    daemon = subprocess.Popen(command, env=os.environ | settings, cwd=tmp_path)
    try:
        _until(lambda: len(worker_pids(daemon.pid)) == 2 and (tmp_path / "parser.sock").exists())
        workers = worker_pids(daemon.pid)
        os.kill(workers[0], signal.SIGSTOP)
    finally:
        daemon.kill()
        daemon.wait()
    _until(lambda: not any(runs(pid) for pid in workers))


def _until(true: Callable[[], bool]) -> None:
    """Wait for it, at most twenty seconds."""
    ends = time.monotonic() + 20
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.parametrize(
    "answer",
    [
        "b'rubbish' * 100",
        "HEAD.pack(6, 1, 0, 0)",
        "HEAD.pack(4, 2, 0, 0) + HEAD.pack(6, 2, 0, 0)",
        "HEAD.pack(4, 1, 0, 0) + HEAD.pack(6, 1, 0, 0) * 2",
        "HEAD.pack(4, 2, 0, 0) + HEAD.pack(6, 1, 0, 0) + HEAD.pack(7, 0, 0, 0)",
        "HEAD.pack(7, 0, 0, 0)",
        "HEAD.pack(4, 1, 0, 0) * 2",
        "HEAD.pack(4, 1, 1, 0) + b'\\xff'",
        "HEAD.pack(6, 1, 2**32 - 1, 2**32 - 1)",
        "HEAD.pack(1, 0, 0, 0)",
        "b''.join(HEAD.pack(4, 99, 0, 0) if n == 0 else HEAD.pack(6, n, 3 * 2**20, 0) "
        "+ b'x' * 3 * 2**20 for n in range(40))",
    ],
)
async def test_lying_worker_is_a_crash(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """A worker that answers out of order, too much, or rubbish fails its document and is gone."""
    taken_over = (
        "import os; from services.parser.sandbox.frames import HEAD, SIZE; "
        "os.write(1, HEAD.pack(1, 0, 0, 0)); os.read(0, 100000); "
        f"a = {answer}\nwhile a: a = a[os.write(1, a):]\n"
        "import time; time.sleep(60)"
    )
    boot = f"import sys; sys.path.extend(sys.argv[2:])\n{taken_over}"
    monkeypatch.setattr(pools, "BOOT", boot)
    pool = Pool(BOUNDS)
    await pool.start()
    try:
        (liar,) = pool.pids()
        with pytest.raises(DocumentUnreadable) as refused:
            await _read(pool, b"text")
        assert refused.value.metadata["cause"] == "crash"
        await gone(liar)
    finally:
        await pool.stop()


async def test_pool_without_workers_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no worker can be started, starting fails with PROVIDER_UNAVAILABLE and leaves none."""
    monkeypatch.setattr(pools, "BOOT", "raise SystemExit(3)")
    pool = Pool(BOUNDS)
    with pytest.raises(ProviderUnavailable):
        await pool.start()
    assert not pool.healthy
    assert worker_pids() == []


async def test_pool_recovers_when_workers_can_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents are refused while no worker can be had, and read once one can."""
    pool = Pool(BOUNDS)
    await pool.start()
    try:
        with monkeypatch.context() as broken:
            broken.setattr(pools, "BOOT", "raise SystemExit(3)")
            os.kill(pool.pids()[0], 9)
            with pytest.raises((ProviderUnavailable, DocumentUnreadable)):
                await _read(pool, b"text")
            with pytest.raises(ProviderUnavailable):
                await _read(pool, b"text")
            assert not pool.healthy
        async with asyncio.timeout(20):
            while not pool.healthy:  # health is polled, as the daemon does
                await asyncio.sleep(0.05)
        assert await _read(pool, b"text") == ["text"]
    finally:
        await pool.stop()


async def _read(pool: Pool, content: bytes) -> list[str]:
    """The texts of the document's pages."""
    request = Request(Kind.PARSE, content)
    return [f.second async for f in pool.answers(request) if f.kind is Kind.PAGE]
