"""The server of a directory: started, or attached to where another process runs it."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from chassis.embedded.cluster import (
    LEFTOVER_TIMEOUT_S,
    check_major,
    clear_half_made,
    clear_previous,
    initialise,
    is_leftover,
)
from chassis.embedded.connection import (
    answers,
    free_port,
    port_answers,
    port_of,
    run_to_end,
    until_ready,
    url_of,
)
from chassis.embedded.faults import EmbeddedPostgresError, explained, told
from chassis.embedded.files import Files, private, read, tail, trim, try_lock, write
from chassis.embedded.identity import Identity, adopt, choose_identity, own
from chassis.embedded.processes import binary, spawn

_ATTACH_TIMEOUT_S = 60.0
_READY_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 30.0
_POLL_S = 0.02
_PORTS_MAX = 5

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
    _files: Files
    _identity: Identity | None = field(default=None, repr=False)
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
        files = Files(Path(os.path.abspath(directory)).resolve())
        with told(files.directory):
            _prepare(files.directory)
            deadline = time.monotonic() + _ATTACH_TIMEOUT_S
            while (lock := try_lock(files.lock)) is None:
                url = read(files.url)
                if url and run_to_end(answers(url)):
                    return cls(url, False, files)
                if time.monotonic() > deadline:
                    raise EmbeddedPostgresError(
                        f"another process holds {files.lock} but its server does not answer: "
                        f"stop that process, then start again (see {files.log})"
                    )
                time.sleep(_POLL_S)
            server = cls("", True, files, None, {**_SETTINGS, **(settings or {})}, lock)
            try:
                server._identity = choose_identity(files.directory, files.data)
                adopt(files.cluster, server._identity)
                own(files.lock, server._identity)
                server._bring_up()
            except BaseException:
                server.stop()
                raise
            return server

    def alive(self) -> bool:
        """Whether the server runs. The owner's calls also keep the log file small."""
        if self._process is None or self._identity is None:
            return not self.is_owner and port_answers(port_of(self.url))
        with contextlib.suppress(OSError):
            trim(self._files.log, self._identity)
        return self._process.poll() is None

    def restart(self) -> None:
        """Bring the server back with the same port and url, after it died or while it runs.

        Only the owner may. Raises EmbeddedPostgresError.
        """
        if not self.is_owner or self._lock is None:
            raise EmbeddedPostgresError(
                "this process does not run the database server: the one that does restarts it"
            )
        with told(self._files.directory):
            self._end()
            self._bring_up(port=port_of(self.url))

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
        clear_half_made(self._files)
        if not self._files.cluster.exists():
            initialise(self._files, self._identity)
        check_major(self._files)
        clear_previous(self._files)
        self._launch(port)
        write(self._files.url, self.url, self._identity)

    def _launch(self, fixed_port: int | None) -> None:
        password = self._files.password.read_text()
        wanted = fixed_port or port_of(read(self._files.url))
        deadline = time.monotonic() + LEFTOVER_TIMEOUT_S
        ports_left = _PORTS_MAX
        while True:
            port = fixed_port or free_port(wanted)
            self.url = url_of(password, port)
            said = self._run_until_ready(port)
            if said is None:
                return
            if "Address already in use" in said and not fixed_port and ports_left:
                wanted, ports_left = None, ports_left - 1
            elif is_leftover(said) and "space" not in said and time.monotonic() < deadline:
                time.sleep(0.1)
                clear_previous(self._files)
            else:
                raise explained(said, self._files.directory, self._files.log, port)

    def _run_until_ready(self, port: int) -> str | None:
        """Start `postgres`; None once it answers, else what it said before it ended."""
        assert self._identity is not None
        trim(self._files.log, self._identity)
        options = {**self._settings, "port": str(port)}
        command = [str(binary("postgres")), "-D", str(self._files.data)]
        command += [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with open(self._files.log, "ab", opener=private) as log:
            own(self._files.log, self._identity)
            offset = log.tell()
            process = self._process = spawn(self._identity.text, command, log.fileno())
        if run_to_end(until_ready(self.url, process, timeout_s=_READY_TIMEOUT_S)):
            return None
        if process.poll() is None:
            self._end()
            raise EmbeddedPostgresError(
                f"the embedded PostgreSQL did not answer within {_READY_TIMEOUT_S:.0f} s: see "
                f"{self._files.log}"
            )
        return tail(self._files.log, offset)


def _prepare(directory: Path) -> None:
    if platform.system() != "Linux":
        raise EmbeddedPostgresError(
            "the embedded database runs on Linux: set TOLLGATE_DATABASE_URL to a PostgreSQL "
            "of your own"
        )
    binary("postgres")
    # Others may pass through, to the cluster that one of them may own, but list nothing; every
    # file in it is private.
    directory.mkdir(mode=0o711, parents=True, exist_ok=True)
