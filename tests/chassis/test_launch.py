"""A daemon as a process: it ends when it is told to, whatever it is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOM = """
import asyncio
from contextlib import asynccontextmanager

from chassis.server import Daemon, launch
from chassis.settings import RoomSettings, room_config


class Settings(RoomSettings):
    model_config = room_config("sleepy")
    listen: str = "127.0.0.1:0"


async def for_ever():
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            pass


@asynccontextmanager
async def wire(mesh, settings):
    print("starting", flush=True)
    if "{when}" == "start":
        await asyncio.sleep(3600)
    daemon = Daemon("sleepy", mesh, listen=settings.listen)
    async with daemon.serving():
        print("serving", flush=True)
        yield daemon
    if "{when}" == "stop":
        await for_ever()


launch(wire, Settings)
"""


@pytest.mark.parametrize(
    ("when", "told_at", "code"),
    [("start", "starting", 0), ("never", "serving", 0), ("stop", "serving", 1)],
)
def test_a_daemon_that_is_told_to_stop_ends(
    tmp_path: Path, when: str, told_at: str, code: int
) -> None:
    """While it starts, while it serves, and even where its own ending hangs."""
    room = tmp_path / "room.py"
    room.write_text(ROOM.replace("{when}", when))
    environment = os.environ | {"TOLLGATE_STATE_DIR": str(tmp_path), "TOLLGATE_GRACE_S": "0.1"}
    process = subprocess.Popen(
        [sys.executable, str(room)], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == told_at:
                break
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
        process.communicate()
