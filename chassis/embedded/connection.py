"""Whether a server answers, and on which port it may."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import asyncpg

from chassis.embedded.faults import EmbeddedPostgresError

USER = "tollgate"
DATABASE = "tollgate"

_POLL_S = 0.02


def url_of(password: str, port: int) -> str:
    """Where our server is, for a client of PostgreSQL."""
    return f"postgresql://{USER}:{password}@127.0.0.1:{port}/{DATABASE}?sslmode=disable"


def run_to_end(work: Coroutine[None, None, bool]) -> bool:
    """Run a coroutine from plain code, whether or not this thread has a running loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


async def answers(url: str) -> bool:
    """Whether a server with our password answers; makes our database where it is missing."""
    try:
        try:
            connection = await asyncpg.connect(url, timeout=5)
        except asyncpg.InvalidCatalogNameError:
            connection = await asyncpg.connect(url, database="postgres", timeout=5)
            await connection.execute(f"CREATE DATABASE {DATABASE}")
        await connection.close()
    except (ConnectionError, TimeoutError, asyncpg.PostgresError, asyncpg.InterfaceError):
        return False
    return True


async def until_ready(url: str, process: subprocess.Popen[bytes], *, timeout_s: float) -> bool:
    """Wait until the server answers; False once it has ended or took too long."""
    deadline = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < deadline:
        if await answers(url):
            return True
        await asyncio.sleep(_POLL_S)
    return False


def port_of(url: str) -> int | None:
    """The port of a url; None where the url is empty."""
    return urlsplit(url).port if url else None


def port_answers(port: int | None) -> bool:
    """Whether anything listens there."""
    try:
        with socket.create_connection(("127.0.0.1", port or 0), timeout=1):
            return True
    except OSError:
        return False


def free_port(wanted: int | None) -> int:
    """The wanted port if nobody has it, else one that is free."""
    for port in (wanted, 0) if wanted else (0,):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise EmbeddedPostgresError("no TCP port is free on 127.0.0.1: close some programs")
