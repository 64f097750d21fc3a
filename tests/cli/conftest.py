"""Meshes for the tests of the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.running import Up, environment_of


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """One mesh for all commands of the session."""
    up = Up.start(environment_of(tmp_path_factory.mktemp("mesh")))
    try:
        up.until("serving")
        yield up
    finally:
        up.end()


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Up]:
    """A mesh that the test may kill, being started."""
    up = Up.start(environment_of(tmp_path / "state"))
    try:
        yield up
    finally:
        up.end()
