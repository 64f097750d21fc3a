"""A mesh on one machine: the database and every daemon, each a process of its own.

Daemons run in sessions of their own, so that a terminal's Ctrl-C reaches only the supervisor, and
get SIGTERM from the kernel should the supervisor be killed. One that dies is started again.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2
from tollgate.router.v1 import router_pb2, router_pb2_grpc

from chassis.call import IDENTITY, Call
from chassis.client import channel
from chassis.embedded import EmbeddedPostgres, EmbeddedPostgresError
from chassis.identity import sign
from chassis.settings import MeshSettings
from cli import logs, ports
from cli.together import together

# In the order in which each can find its peers; they are stopped in the opposite one.
ROOMS = ("cost", "storage", "parser", "embedder", "router", "corpus")
_WITHOUT_DATABASE = frozenset({"parser", "embedder"})
_STOPPED_TOGETHER = (("corpus",), ("router",), ("embedder", "parser", "storage"), ("cost",))

START_TIMEOUT_S = 180.0
_ROUTED_TIMEOUT_S = 10.0
_POLL_S = 0.05
_BACKOFF_S, _BACKOFF_MAX_S = 0.5, 30.0
_STEADY_S = 60.0
_FAULTS_TIMEOUT_S = 5.0
_SETTINGS_AT_FAULT, _SETTINGS_TIMEOUT_S = 78, 20.0
_FREE_BYTES_MIN = 64 << 20
_CHILD = Path(__file__).with_name("child.py")


class UpError(Exception):
    """The mesh cannot run as asked. The message is for people: what is wrong and what to do."""


class Interrupted(Exception):
    """Somebody asked the supervisor to stop before the mesh was up."""


@dataclass
class Reporter:
    """Who is told what happens. Each is called with words for people."""

    progress: Callable[[str, str], None]
    """A room (or `database`) and how far it is."""
    line: Callable[[str], None]
    """Something happened that was not asked for."""


@dataclass
class _Room:
    """One daemon and its process."""

    name: str
    address: str
    log: Path
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0
    log_offset: int = 0
    failures: int = 0
    has_served: bool = False


@dataclass
class Supervisor:
    """Starts, watches and stops one mesh. `stopping` is set by the first signal."""

    mesh: MeshSettings
    report: Reporter
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables for the daemons, over those of this process."""
    prepare: Callable[[str], Awaitable[str]] | None = None
    """Makes the database's url that the daemons get out of the embedded server's."""
    stopping: asyncio.Event = field(default_factory=asyncio.Event)
    _hurry: asyncio.Event = field(default_factory=asyncio.Event)
    _database: EmbeddedPostgres | None = None
    _database_url: str = ""
    _rooms: dict[str, _Room] = field(default_factory=dict)
    _lock: int | None = None

    @property
    def state_dir(self) -> Path:
        """Where everything that the mesh keeps is, absolute."""
        return self.mesh.state_dir.absolute()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The mesh runs within, watched; all of it has ended after. SIGINT and SIGTERM stop it.

        Raises UpError where it cannot start, Interrupted where it was told to stop meanwhile.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._told)
        watching: asyncio.Task[None] | None = None
        try:
            self._claim()
            await self._unless_told(self._start())
            watching = asyncio.create_task(self._watch())
            watching.add_done_callback(self._watched)
            yield
        finally:
            if watching is not None:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
            await self._stop()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)

    async def during(self, work: Coroutine[Any, Any, None]) -> None:
        """Do some work with the mesh; a signal ends it. Raises Interrupted then."""
        await self._unless_told(work)

    def _told(self) -> None:
        (self._hurry if self.stopping.is_set() else self.stopping).set()

    async def _unless_told(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        told = asyncio.create_task(self.stopping.wait())
        await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
        told.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            raise Interrupted
        await task

    # --- before anything starts ---------------------------------------------------------------

    def _claim(self) -> None:
        """Check what can be checked, and hold the state directory for ourselves."""
        state_dir = self.state_dir
        try:
            (state_dir / "logs").mkdir(parents=True, exist_ok=True)
            lock = os.open(state_dir / "up.lock", os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                said = os.read(lock, 4096)
                os.close(lock)
                raise UpError(_already_running(state_dir, said)) from None
            self._lock = lock
            os.ftruncate(lock, 0)
            claim = {"pid": os.getpid(), "router": self.mesh.router_address}
            os.write(lock, json.dumps(claim).encode())
            free = shutil.disk_usage(state_dir).free
        except OSError as error:
            raise UpError(_file_fault(error, state_dir)) from None
        if free < _FREE_BYTES_MIN:
            raise UpError(_full(state_dir))
        addresses = {room: self._listen(room) for room in ROOMS}
        if found := ports.faults(addresses):
            raise UpError("\n".join(found))
        try:
            _ = self.mesh.secret  # Made here, so that no two daemons make it at once.
        except OSError as error:
            raise UpError(_file_fault(error, state_dir)) from None
        for room in ROOMS:
            log = state_dir / "logs" / f"{room}.jsonl"
            self._rooms[room] = _Room(room, _dialled(addresses[room]), log)

    def _listen(self, room: str) -> str:
        variable = f"TOLLGATE_{room.upper()}_LISTEN"
        own = self.environment.get(variable) or os.environ.get(variable)
        address: str = own or getattr(self.mesh, f"{room}_address")
        return address

    # --- starting -----------------------------------------------------------------------------

    async def _start(self) -> None:
        for room in self._rooms.values():
            logs.rotate(room.log)
        early = [r for r in self._rooms.values() if r.name in _WITHOUT_DATABASE]
        late = [r for r in self._rooms.values() if r.name not in _WITHOUT_DATABASE]
        # What needs no database need not wait for it.
        for room in early:
            await self._spawn(room)
        await self._start_database()
        for room in late:
            await self._spawn(room)
        await together(*(self._first_start(room) for room in self._rooms.values()))
        await self._until_routed()

    async def _start_database(self) -> None:
        if self.mesh.database_url is not None:
            self._database_url = self.mesh.database_url.get_secret_value()
            self.report.progress("database", "the one of TOLLGATE_DATABASE_URL")
            return
        self.report.progress("database", "starting")
        started = time.monotonic()
        starting = asyncio.ensure_future(
            asyncio.to_thread(EmbeddedPostgres.start, self.state_dir / "postgres")
        )
        try:
            self._database = await asyncio.shield(starting)
        except asyncio.CancelledError:
            # The thread cannot be stopped midway; what it started is ours to stop.
            with contextlib.suppress(EmbeddedPostgresError):
                self._database = await starting
            raise
        except EmbeddedPostgresError as error:
            raise UpError(str(error)) from None
        url = self._database.url
        self._database_url = await self.prepare(url) if self.prepare else url
        self.report.progress("database", f"ready after {time.monotonic() - started:.1f} s")

    async def _spawn(self, room: _Room) -> None:
        arguments = [sys.executable, "-I", "-S", str(_CHILD), str(os.getpid()), sys.executable]
        arguments += ["-m", f"services.{room.name}.main"]
        try:
            with room.log.open("ab") as log:
                room.log_offset = log.tell()
                room.process = await asyncio.create_subprocess_exec(
                    *arguments,
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=self._environment_of(room),
                    start_new_session=True,
                )
        except OSError as error:
            raise UpError(_file_fault(error, self.state_dir)) from None
        room.started = time.monotonic()
        self.report.progress(room.name, "starting")

    def _environment_of(self, room: _Room) -> dict[str, str]:
        made = {**os.environ, **self.environment, "PYTHONUNBUFFERED": "1"}
        # Daemons start processes by exec alone: gRPC's fork handlers could only warn.
        made["GRPC_ENABLE_FORK_SUPPORT"] = "0"
        made["TOLLGATE_STATE_DIR"] = str(self.state_dir)
        if self._database is not None:
            made["TOLLGATE_DATABASE_URL"] = self._database_url
            made["TOLLGATE_DATABASE_DIRECT_URL"] = self._database_url
            made["TOLLGATE_DATABASE_POOLED"] = "false"
        for name in ROOMS:
            made[f"TOLLGATE_{name.upper()}_ADDRESS"] = getattr(self.mesh, f"{name}_address")
        made[f"TOLLGATE_{room.name.upper()}_LISTEN"] = self._listen(room.name)
        return made

    async def _first_start(self, room: _Room) -> None:
        if not await self._until_serving(room):
            await self._until_others_served_or_ended()
            raise UpError("\n".join(self._faults()))
        room.has_served = True
        self.report.progress(room.name, f"serving after {time.monotonic() - room.started:.1f} s")

    async def _until_others_served_or_ended(self) -> None:
        """Let every daemon say what it finds at fault; a while at the most."""
        deadline = time.monotonic() + _FAULTS_TIMEOUT_S
        while time.monotonic() < deadline:
            if all(room.has_served or _has_ended(room) for room in self._rooms.values()):
                return
            await asyncio.sleep(_POLL_S)

    def _faults(self) -> list[str]:
        """What every daemon that ended has said, each thing once: settings first, a line each."""
        settings: dict[str, None] = {}
        others: dict[str, str] = {}
        for room in filter(_has_ended, self._rooms.values()):
            code = room.process.returncode if room.process else None
            said = logs.plain_lines(room.log, room.log_offset, prefix=f"tollgate {room.name}: ")
            if code == _SETTINGS_AT_FAULT and said:
                settings |= dict.fromkeys(said)
            else:
                # Where the database fails, all that need it say the same.
                reason = logs.last_error(room.log, room.log_offset) or room.name
                others.setdefault(reason, self._why_it_ended(room))
        return [*settings, *others.values()]

    async def _until_routed(self) -> None:
        """Wait until the router has heard of every backend how it is; a while at the most."""
        deadline = time.monotonic() + _ROUTED_TIMEOUT_S
        identity = sign(Call(tenant="default"), self.mesh.secret)
        unknown = {router_pb2.BACKEND_HEALTH_UNSPECIFIED, router_pb2.BACKEND_HEALTH_UNREACHABLE}
        async with channel(self._rooms["router"].address, self.mesh) as dialled:
            stub = router_pb2_grpc.RouterServiceStub(dialled)
            while time.monotonic() < deadline:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    answer = await stub.ListBackends(
                        router_pb2.ListBackendsRequest(), timeout=5, metadata=[(IDENTITY, identity)]
                    )
                    if not any(backend.health in unknown for backend in answer.backends):
                        return
                await asyncio.sleep(_POLL_S)

    async def _until_serving(self, room: _Room) -> bool:
        """Wait for a daemon. False when it ended instead; raises UpError when it takes too long."""
        deadline = room.started + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if _has_ended(room):
                return False
            if await is_serving(room.address, self.mesh):
                return True
            await asyncio.sleep(_POLL_S)
        raise UpError(
            f"the {room.name} daemon does not answer at {room.address} after "
            f"{START_TIMEOUT_S:.0f} s: its log is {room.log}"
        )

    def _why_it_ended(self, room: _Room) -> str:
        code = room.process.returncode if room.process else None
        reason = logs.last_error(room.log, room.log_offset)
        if "No module named" in reason:
            module = reason.rpartition("No module named ")[2].strip("'\"")
            return f"the {room.name} daemon misses {module}: run `make clean` and try again"
        if "No space left on device" in reason:
            return _full(self.state_dir)
        said = f": {reason}" if reason else ""
        return f"the {room.name} daemon {_ending(code)}{said} (its log is {room.log})"

    # --- watching -----------------------------------------------------------------------------

    def _watched(self, watching: asyncio.Task[None]) -> None:
        """Nobody keeps a mesh whose supervisor has failed: say so, and stop all of it."""
        if not watching.cancelled() and (error := watching.exception()) is not None:
            self.report.line(f"the supervisor failed ({type(error).__name__}: {error})")
            self.stopping.set()

    async def _watch(self) -> None:
        await together(*(self._keep(room) for room in self._rooms.values()), self._keep_database())

    async def _keep(self, room: _Room) -> None:
        while True:
            assert room.process is not None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(room.process.wait(), timeout=5)
            logs.trim(room.log)
            if room.process.returncode is None:
                continue
            _kill_group(room.process.pid)
            if time.monotonic() - room.started > _STEADY_S:
                room.failures = 0
            delay_s = min(_BACKOFF_S * 2**room.failures, _BACKOFF_MAX_S)
            room.failures += 1
            self.report.line(f"{self._why_it_ended(room)}; starting it again in {delay_s:g} s")
            await asyncio.sleep(delay_s)
            await self._again(room)

    async def _again(self, room: _Room) -> None:
        try:
            await self._spawn(room)
            if await self._until_serving(room):
                self.report.line(f"the {room.name} daemon is serving again")
        except UpError as error:
            self.report.line(str(error))

    async def _keep_database(self) -> None:
        failures = 0
        while self._database is not None:
            await asyncio.sleep(0.5)
            if self._database.alive():
                failures = 0
                continue
            try:
                await asyncio.to_thread(self._database.restart)
                self.report.line("the database had ended and was started again")
            except EmbeddedPostgresError as error:
                delay_s = min(_BACKOFF_S * 2**failures, _BACKOFF_MAX_S)
                failures += 1
                self.report.line(f"{error}; trying again in {delay_s:g} s")
                await asyncio.sleep(delay_s)

    # --- stopping -----------------------------------------------------------------------------

    async def _stop(self) -> None:
        hurried = asyncio.create_task(self._hurry.wait())
        for names in _STOPPED_TOGETHER:
            rooms = [self._rooms[name] for name in names if name in self._rooms]
            await asyncio.gather(*(self._end(room, hurried) for room in rooms))
        hurried.cancel()
        if self._database is not None:
            # Quick by itself: nobody is connected any more.
            await asyncio.to_thread(self._database.stop)
            self.report.progress("database", "stopped")
        for room in self._rooms.values():
            _remove_socket(room.address)
        if self._lock is not None:
            os.ftruncate(self._lock, 0)
            os.close(self._lock)
            self._lock = None

    async def _end(self, room: _Room, hurried: asyncio.Task[bool]) -> None:
        process = room.process
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            waiting = asyncio.create_task(process.wait())
            patience_s = self.mesh.drain_s + 3 * self.mesh.grace_s + 5
            await asyncio.wait(
                {waiting, hurried}, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not waiting.done():
                _kill_group(process.pid)
            await waiting
        _kill_group(process.pid)
        self.report.progress(room.name, "stopped")


def settings_faults() -> list[str]:
    """What each daemon finds at fault where the shared settings are, so that it ends at once."""
    started = [
        (
            f"tollgate {room}: ",
            subprocess.Popen(
                [sys.executable, "-m", f"services.{room}.main"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            ),
        )
        for room in ROOMS
    ]
    found: list[str] = []
    for prefix, process in started:
        try:
            said = process.communicate(timeout=_SETTINGS_TIMEOUT_S)[1].splitlines()
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[1].splitlines()
        found += [line.removeprefix(prefix) for line in said if line.startswith(prefix)]
    return found


HealthCheck = grpc.aio.UnaryUnaryMultiCallable[
    health_pb2.HealthCheckRequest, health_pb2.HealthCheckResponse
]


def check(dialled: grpc.aio.Channel) -> HealthCheck:
    """The call `Check` of a daemon's health service."""
    return dialled.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=health_pb2.HealthCheckRequest.SerializeToString,
        response_deserializer=health_pb2.HealthCheckResponse.FromString,
    )


async def is_serving(address: str, mesh: MeshSettings, service: str = "") -> bool:
    """Whether a daemon, or one service of it, answers its health check with SERVING."""
    if not await _accepts(address):
        return False
    async with channel(address, mesh) as dialled:
        try:
            answer = await check(dialled)(health_pb2.HealthCheckRequest(service=service), timeout=5)
        except grpc.aio.AioRpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def _accepts(address: str) -> bool:
    """Whether somebody listens: a bare connection is cheaper than a channel that backs off."""
    try:
        if address.startswith("unix:"):
            _, writer = await asyncio.open_unix_connection(address.removeprefix("unix:"))
        else:
            host, _, port = address.rpartition(":")
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except OSError:
        return False
    writer.close()
    return True


def _remove_socket(address: str) -> None:
    if address.startswith("unix:"):
        Path(address.removeprefix("unix:")).unlink(missing_ok=True)


def _dialled(listen: str) -> str:
    """Where a daemon that listens on every address of the machine is dialled from the same one."""
    host, colon, port = listen.rpartition(":")
    if listen.startswith("unix:"):
        return listen
    return f"127.0.0.1{colon}{port}" if host in {"0.0.0.0", "[::]", "::", "*"} else listen  # noqa: S104  # compared, not bound


def _has_ended(room: _Room) -> bool:
    return room.process is None or room.process.returncode is not None


def _kill_group(pid: int) -> None:
    """Kill a daemon and all that it started; nothing where they are gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"


# --- faults ----------------------------------------------------------------------------------


def _already_running(state_dir: Path, said: bytes) -> str:
    try:
        claim = json.loads(said)
        who = f" (pid {claim['pid']}, router at {claim['router']})"
    except (ValueError, KeyError, TypeError):
        who = ""
    return (
        f"a mesh is already running on {state_dir}{who}: use it, or stop it with Ctrl-C where it "
        "runs, or set TOLLGATE_STATE_DIR to another directory"
    )


def _full(state_dir: Path) -> str:
    return f"the disk that holds {state_dir} is full: free some space on it"


def _file_fault(error: OSError, state_dir: Path) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _full(state_dir)
    return (
        f"cannot write to {error.filename or state_dir}: {error.strerror}; set TOLLGATE_STATE_DIR "
        "to a directory that you may write to"
    )
