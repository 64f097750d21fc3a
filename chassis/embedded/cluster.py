"""The data: made whole on first use, of our version, and cleared of what a crash left."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from chassis.embedded.connection import USER
from chassis.embedded.faults import EmbeddedPostgresError, explained
from chassis.embedded.files import Files, read, sync, write
from chassis.embedded.identity import Identity, own
from chassis.embedded.processes import MAJOR, binary, finish, spawn

LEFTOVER_TIMEOUT_S = 20.0
_POLL_S = 0.02


def initialise(files: Files, identity: Identity) -> None:
    """Make the cluster beside its place, then rename: a half-made one is never in the place."""
    staging = Path(tempfile.mkdtemp(prefix="new-", dir=files.directory))
    try:
        own(staging, identity)
        password = staging / files.password.name
        write(password, secrets.token_urlsafe(24), identity)
        command = [str(binary("initdb")), "-D", str(staging / files.data.name), "-U", USER]
        command += ["--pwfile", str(password), "--auth=scram-sha-256", "--encoding=UTF8"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        status, said = finish(spawn(identity.text, command, subprocess.PIPE))
        if status != 0:
            raise explained(said, files.directory, files.log, 0)
        staging.rename(files.cluster)
        sync(files.directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def check_major(files: Files) -> None:
    """Refuse data of another major version of PostgreSQL."""
    major = read(files.data / "PG_VERSION").strip()
    if major != str(MAJOR):
        raise EmbeddedPostgresError(
            f"{files.cluster} holds data of PostgreSQL {major or '(unknown)'} and this release "
            f"runs {MAJOR}: move that directory away to begin anew, or dump it with PostgreSQL "
            f"{major or 'of its version'} and restore it"
        )


def clear_half_made(files: Files) -> None:
    """Remove what a killed first start left; its initdb may take a moment to notice and end."""
    deadline = time.monotonic() + LEFTOVER_TIMEOUT_S
    while (rest := list(files.directory.glob("new-*"))) and time.monotonic() < deadline:
        for path in rest:
            shutil.rmtree(path, ignore_errors=True)
        time.sleep(_POLL_S)


def clear_previous(files: Files) -> None:
    """See the end of a server that outlived its owner, and of its pid file if that misleads.

    We hold the lock, so a postmaster of this directory is an orphan on its way out. A pid file
    whose number now belongs to some other process would make PostgreSQL refuse to start; in any
    other case PostgreSQL judges the file itself, and better.
    """
    pid_file = files.data / "postmaster.pid"
    lines = read(pid_file).splitlines()
    pid = int(lines[0]) if lines and lines[0].isdigit() else 0
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        deadline = time.monotonic() + LEFTOVER_TIMEOUT_S
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


def is_leftover(said: str) -> bool:
    """Whether parts of a server that was killed are still there; they end by themselves."""
    return "pre-existing shared memory block" in said or "lock file" in said
