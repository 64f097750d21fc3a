"""What lies in the directory, and how it is locked, read, replaced and kept small."""

from __future__ import annotations

import fcntl
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from chassis.embedded.identity import Identity, own

_LOG_BYTES_MAX = 4 << 20


@dataclass(frozen=True, slots=True)
class Files:
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


def private(path: str, flags: int) -> int:
    """An opener of files that their owner alone may read."""
    return os.open(path, flags, 0o600)


def try_lock(path: Path) -> int | None:
    """A descriptor that holds the lock until it is closed, or None when another has it."""
    descriptor = private(str(path), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read(path: Path) -> str:
    """The text; empty where there is no such file."""
    try:
        return path.read_text()
    except FileNotFoundError:
        return ""


def write(path: Path, text: str, identity: Identity) -> None:
    """Replace the file whole, readable by its owner alone."""
    if read(path) == text:
        own(path, identity)
        return
    new = path.with_name(f"{path.name}.new")
    with open(new, "w", opener=private) as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    own(new, identity)
    new.replace(path)


def sync(directory: Path) -> None:
    """Make a rename in the directory last."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def trim(log: Path, identity: Identity) -> None:
    """Keep one older generation. PostgreSQL appends, so the file can be emptied under it."""
    if not log.exists() or log.stat().st_size <= _LOG_BYTES_MAX:
        return
    older = log.with_name(f"{log.name}.1")
    with open(log, "rb") as source, open(older, "wb", opener=private) as target:
        shutil.copyfileobj(source, target)
    own(older, identity)
    os.truncate(log, 0)


def tail(log: Path, offset: int) -> str:
    """What was logged since it was `offset` bytes long, at most 64 KiB."""
    with open(log, "rb") as file:
        file.seek(offset)
        return file.read(64 << 10).decode(errors="replace").strip()
