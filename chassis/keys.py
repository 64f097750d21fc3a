"""API keys: a file of hashes, one JSON object a line.

The router reads it and `tollgate keys` writes it.

A key is `tg_<id>_<secret>`. The secret has 256 random bits, so a plain SHA-256 of the key is all
that the file holds: there is nothing to guess. The key itself is shown once, when it is made.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from chassis.call import checked_name
from chassis.errors import NotFound, Violation

PREFIX = "tg"
_KEY_MAX = 256


class KeysError(Exception):
    """The file of keys cannot be used. The message is one line for people."""


@dataclass(frozen=True, slots=True)
class Key:
    """An API key as the file has it. `sha256` is that of the whole key, in hexadecimal."""

    id: str
    name: str
    tenant: str
    sha256: str
    project: str = ""
    operator: bool = False
    created: str = ""
    """When it was made: ISO 8601, UTC."""


def default_path(state_dir: Path) -> Path:
    """Where the keys of a mesh are unless a setting says otherwise."""
    return state_dir / "keys.jsonl"


class KeyFile:
    """The keys of one file, read again whenever it has changed; a missing file has no keys."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._read_as: tuple[int, int, int] | None = None
        self._keys: dict[str, Key] = {}

    def keys(self) -> list[Key]:
        """All keys, in the order in which they were made. Raises KeysError."""
        self._refresh()
        return list(self._keys.values())

    def find(self, text: str) -> Key | None:
        """The key that this text is, if it is one of ours. Raises KeysError."""
        self._refresh()
        parts = text.split("_", 2) if len(text) <= _KEY_MAX and text.isascii() else []
        key = self._keys.get(parts[1]) if len(parts) == 3 and parts[0] == PREFIX else None
        # Compared also where there is no such key, so that time tells nothing.
        genuine = hmac.compare_digest(_digest(text), key.sha256 if key else _digest(""))
        return key if genuine else None

    def add(
        self, name: str, *, tenant: str, project: str = "", operator: bool = False
    ) -> tuple[Key, str]:
        """Make a key. Answers it and its text, which nobody can tell again.

        Raises InvalidField, and KeysError where the file cannot be written.
        """
        checked_name("name", name)
        checked_name("tenant", tenant)
        if project:
            checked_name("project", project)
        id_ = secrets.token_hex(6)
        text = f"{PREFIX}_{id_}_{secrets.token_urlsafe(32)}"
        created = datetime.now(UTC).isoformat(timespec="seconds")
        key = Key(id_, name, tenant, _digest(text), project, operator, created)
        self._change(lambda keys: [*keys, key])
        return key, text

    def revoke(self, id_: str) -> Key:
        """Take a key out of the file; the router refuses it at once. Raises NotFound, KeysError."""
        found = next((key for key in self.keys() if key.id == id_), None)
        if found is None:
            raise NotFound("no key has this id", violations=[Violation("key", id_[:64])])
        self._change(lambda keys: [key for key in keys if key.id != id_])
        return found

    def _change(self, change: Callable[[list[Key]], list[Key]]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_name(f"{self.path.name}.lock")):
                keys = change(self.keys())
                _replace(self.path, "".join(json.dumps(asdict(key)) + "\n" for key in keys))
        except OSError as error:
            raise KeysError(f"{self.path}: cannot be written: {error.strerror}") from None

    def _refresh(self) -> None:
        try:
            stat = os.stat(self.path)
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if seen != self._read_as:
                self._keys = {key.id: key for key in _parsed(self.path.read_text())}
                self._read_as = seen
        except FileNotFoundError:
            self._keys, self._read_as = {}, None
        except (OSError, UnicodeDecodeError):
            raise KeysError(f"{self.path}: cannot be read") from None
        except (ValueError, TypeError):
            raise KeysError(f"{self.path}: a line is not a key: make it anew") from None


def _parsed(text: str) -> Iterator[Key]:
    known = {field.name for field in fields(Key)}
    for line in text.splitlines():
        if line.strip():
            # A newer release may know more of a key than we do.
            yield Key(**{name: value for name, value in json.loads(line).items() if name in known})


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time, whichever process it is in."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    """Write a file whole or not at all, for its owner's eyes only."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(beside, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
