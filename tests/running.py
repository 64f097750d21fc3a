"""A real mesh, started by the command itself on free ports, and the command as people run it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from cli.ports import free_ports
from cli.supervisor import ROOMS

START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 45.0


def tollgate(
    *arguments: str, environment: Mapping[str, str], timeout_s: float = 90.0
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )


def environment_of(state_dir: Path, addresses: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a mesh of its own: nothing of the developer's, free ports."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TOLLGATE_")}
    if addresses is None:
        ports = free_ports(len(ROOMS))
        addresses = {room: f"127.0.0.1:{p}" for room, p in zip(ROOMS, ports, strict=True)}
    made = {f"TOLLGATE_{room.upper()}_ADDRESS": address for room, address in addresses.items()}
    return clean | made | {"TOLLGATE_STATE_DIR": str(state_dir)}


def processes_of(pid: int) -> set[int]:
    """A process and everything that it or its children started, as /proc has it now."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, waiting = set[int](), [pid]
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += children.get(one, [])
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Callable[[], Any], timeout_s: float) -> bool:
    """Whether the condition came true in time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return bool(condition())


@dataclass
class Up:
    """`tollgate up --json` as a process, with what it has said."""

    environment: dict[str, str]
    process: subprocess.Popen[str]
    events: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def start(cls, environment: dict[str, str]) -> Up:
        """Start it; it is not up yet."""
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "up", "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        return cls(environment, process)

    def until(self, event: str) -> dict[str, Any]:
        """Read events up to the first of this kind; fail with what was said where there is none."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.events.append(json.loads(line))
            if self.events[-1]["event"] == event:
                return self.events[-1]
        assert self.process.stderr is not None
        pytest.fail(f"no {event}: {self.events} {self.process.stderr.read()}")

    def daemon_pid(self, room: str) -> int:
        """The process of one daemon."""
        for pid in processes_of(self.process.pid):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"services.{room}.main".encode() in words and is_alive(pid):
                return pid
        pytest.fail(f"the {room} daemon does not run")

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Stop it as Ctrl-C does. Returns the exit code."""
        self.process.send_signal(number)
        self.process.communicate(timeout=STOP_TIMEOUT_S)
        return self.process.returncode

    def end(self) -> None:
        """Make sure that nothing is left, whatever the test did."""
        if self.process.poll() is None:
            left = processes_of(self.process.pid)
            self.process.kill()
            self.process.communicate()
            wait_until(lambda: not any(map(is_alive, left)), STOP_TIMEOUT_S)
