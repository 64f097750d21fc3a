"""The image: its recipe, what goes into it, and, where there is a builder, the image itself."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.deploy.variables import ROOMS, ROOT, all_variables

RECIPE = (ROOT / "Dockerfile").read_text()
_BASE = re.search(r"^FROM (\S+)$", RECIPE, re.MULTILINE)
assert _BASE is not None
BASE = f"docker.io/library/{_BASE[1]}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[set[str]]:
    """The names of the files in the wheel that the project builds."""
    directory = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(directory)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = directory.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield set(archive.namelist())


def test_the_wheel_carries_every_file_that_the_code_reads(wheel: set[str]) -> None:
    """All of the packages' files are in: modules, migrations, prices, demo documents."""
    tracked = subprocess.run(
        ["git", "ls-files", "chassis", "services", "cli", "gen/tollgate"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.splitlines()
    expected = {name.removeprefix("gen/") for name in tracked if (ROOT / name).exists()}
    assert expected - wheel == set()
    for suffix in (".sql", "prices.json", ".pdf", ".md", ".html"):
        assert any(name.endswith(suffix) for name in expected), f"nothing like {suffix} is tracked"


def test_the_wheel_has_the_stubs_at_the_top(wheel: set[str]) -> None:
    """Stubs are imported as `tollgate.…`, as from the source root gen/, which is no package."""
    assert "tollgate/embedder/v1/embedder_pb2.py" in wheel
    assert {name.partition("/")[0] for name in wheel} == {
        "chassis",
        "services",
        "cli",
        "tollgate",
        next(name.partition("/")[0] for name in wheel if ".dist-info/" in name),
    }


def test_the_recipe_is_without_fault() -> None:
    """hadolint, with all of its rules, has nothing to say of the Dockerfile."""
    found = Path(sys.executable).with_name("hadolint")
    hadolint = str(found) if found.exists() else shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not installed: `make setup` installs it")
    run = subprocess.run([hadolint, "Dockerfile"], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "")


def test_the_recipe_sets_only_what_the_code_reads() -> None:
    """Every TOLLGATE_ variable of the recipe is a setting, and its state directory is writable."""
    known = {variable.name for variable in all_variables()}
    instructions = re.sub(r"^#.*$", "", RECIPE, flags=re.MULTILINE)
    named = set(re.findall(r"TOLLGATE_\w+", instructions))
    assert named == {"TOLLGATE_STATE_DIR"}
    assert named <= known
    (state_dir,) = re.findall(r"TOLLGATE_STATE_DIR=(\S+)", instructions)
    assert f"--home-dir {state_dir} --create-home" in instructions
    assert f"VOLUME {state_dir}" in instructions


def test_the_recipe_runs_a_room_as_nobody_special() -> None:
    """The last user is a number that is not root's, and the command is a room of the code."""
    assert int(re.findall(r"^USER (\S+)$", RECIPE, re.MULTILINE)[-1]) > 0
    module = re.findall(r'^CMD \["python", "-m", "services\.(\w+)\.main"\]$', RECIPE, re.MULTILINE)
    assert len(module) == 1
    assert module[0] in ROOMS


def test_the_context_is_what_the_recipe_copies() -> None:
    """The builder is sent what COPY names and nothing else: no state, no secrets, no history."""
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", RECIPE, re.MULTILINE)
        for source in line.split()[:-1]
    }
    everything, *rest = (ROOT / ".dockerignore").read_text().splitlines()
    assert everything == "*"
    assert {line[1:] for line in rest if line.startswith("!")} == copied
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.timeout(600)
def test_the_image_builds_and_has_every_room() -> None:
    """The image builds from a base at hand, and its user can load each daemon and the command."""
    if shutil.which("buildah") is None:
        pytest.skip("buildah is not installed")
    # The drivers that need no kernel support; the engine's own where it is set.
    environment = {"STORAGE_DRIVER": "vfs", "BUILDAH_ISOLATION": "chroot"} | os.environ

    def buildah(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["buildah", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    at_hand = buildah("inspect", "--type", "image", BASE).returncode == 0
    if not at_hand and buildah("pull", "--quiet", "--retry", "0", BASE).returncode != 0:
        pytest.skip(f"the base image {BASE} is neither in the local storage nor to be pulled")
    built = buildah("build", "--pull-never", "-t", "tollgate:test", ".")
    assert built.returncode == 0, built.stderr[-2000:]
    container = buildah("from", "--pull-never", "tollgate:test").stdout.strip()
    try:
        assert container
        modules = ", ".join(f"services.{room}.main" for room in ROOMS)
        loads = f"import os, {modules}, cli.main; print(os.getuid())"
        loaded = buildah("run", container, "--", "python", "-c", loads)
        assert (loaded.returncode, loaded.stdout.strip()) == (0, "10001"), loaded.stderr[-2000:]
        answered = buildah("run", container, "--", "tollgate", "--help")
        assert "up" in answered.stdout
    finally:
        buildah("rm", container)
        buildah("rmi", "tollgate:test")
