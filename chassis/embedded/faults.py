"""What is said to people when the database cannot do as asked: what is wrong, what to do."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

_FREE_BYTES_MIN = 32 << 20


class EmbeddedPostgresError(Exception):
    """The server cannot do as asked. The message is for people: what is wrong and what to do."""


@contextlib.contextmanager
def told(directory: Path) -> Iterator[None]:
    """Tell faults of the file system within as ours."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _full(directory) from error
        raise EmbeddedPostgresError(
            f"cannot use {error.filename or directory} for the embedded database: "
            f"{error.strerror or error}; use a data directory that you may write to"
        ) from error


def explained(said: str, directory: Path, log: Path, port: int) -> EmbeddedPostgresError:
    """What PostgreSQL said before it ended, in one line."""
    if "No space left on device" in said or "Disk quota exceeded" in said:
        return _full(directory)
    if shutil.disk_usage(directory).free < _FREE_BYTES_MIN:
        return _full(directory)
    if "Address already in use" in said:
        return EmbeddedPostgresError(
            f"port {port} of the embedded database was taken by another program: end that program"
        )
    marked = [line for line in said.splitlines() if "FATAL" in line or "error" in line.lower()]
    reason = (marked or said.splitlines() or ["it said nothing"])[-1].strip()
    return EmbeddedPostgresError(
        f"the embedded PostgreSQL did not start: {reason} (its log is {log})"
    )


def _full(directory: Path) -> EmbeddedPostgresError:
    return EmbeddedPostgresError(f"the disk that holds {directory} is full: free some space on it")
