"""The log files of the daemons: bounded, and asked for what went wrong last."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

BYTES_MAX = 32 << 20


def last_error(log: Path, offset: int) -> str:
    """The last thing that a daemon complained of since `offset`; empty when it said nothing."""
    plain = ""
    for line in reversed(_lines(log, offset)):
        try:
            event = json.loads(line)
        except ValueError:
            plain = plain or line
            continue
        if isinstance(event, dict) and event.get("level") in {"error", "critical"} and not plain:
            details = [event.get("message"), event.get("error"), event.get("from")]
            return " ".join(str(detail) for detail in details if detail)
    return plain


def plain_lines(log: Path, offset: int, *, prefix: str) -> list[str]:
    """What follows `prefix` in each line since `offset` that begins with it."""
    said = _lines(log, offset)
    return [line.removeprefix(prefix) for line in said if line.startswith(prefix)]


def _lines(log: Path, offset: int) -> list[str]:
    try:
        with log.open("rb") as file:
            file.seek(offset)
            lines = file.read(256 << 10).decode(errors="replace").splitlines()
    except OSError:
        return []
    return [line.strip() for line in lines if line.strip()]


def rotate(log: Path) -> None:
    """Begin a new log; keep the one before."""
    with contextlib.suppress(FileNotFoundError):
        log.replace(log.with_suffix(".1.jsonl"))


def trim(log: Path) -> None:
    """Keep a long-lived log bounded. The daemon appends, so the file can be emptied under it."""
    with contextlib.suppress(OSError):
        if log.stat().st_size > BYTES_MAX:
            shutil.copyfile(log, log.with_suffix(".1.jsonl"))
            os.truncate(log, 0)
