"""`tollgate up`: a mesh that is all there or not there at all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.logs import last_error
from cli.ports import faults, free_ports
from cli.supervisor import ROOMS
from cli.up import by_reflection
from tests.running import (
    START_TIMEOUT_S,
    STOP_TIMEOUT_S,
    Up,
    environment_of,
    is_alive,
    processes_of,
    tollgate,
    wait_until,
)

pytestmark = pytest.mark.timeout(180)


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A mesh whose parts are killed, one after the other."""
    up = Up.start(environment_of(tmp_path_factory.mktemp("victim")))
    try:
        up.until("serving")
        yield up
    finally:
        up.end()


def _accepts(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def test_ctrl_c_stops_every_process_and_frees_every_port(own: Up) -> None:
    """All daemons serve; after SIGINT none of the processes is left and no port answers."""
    serving = own.until("serving")
    assert set(serving["addresses"]) == set(ROOMS)
    assert all(map(_accepts, serving["addresses"].values()))
    everything = processes_of(own.process.pid)
    assert len(everything) > len(ROOMS) + 1  # the daemons, the database and the supervisor
    assert own.stop() == 0
    assert not [pid for pid in everything if is_alive(pid)]
    assert not any(map(_accepts, serving["addresses"].values()))


def test_kill_9_of_the_supervisor_leaves_nothing_and_it_starts_again(own: Up) -> None:
    """Daemons and database go by themselves; the same state directory can be used again."""
    own.until("serving")
    everything = processes_of(own.process.pid)
    own.process.kill()
    own.process.communicate()
    assert wait_until(lambda: not any(map(is_alive, everything)), STOP_TIMEOUT_S)
    again = Up.start(own.environment)
    try:
        again.until("serving")
    finally:
        again.end()


def test_ctrl_c_while_it_starts_stops_what_was_started(own: Up) -> None:
    """Interrupted before all serve, it ends with 130 and leaves nothing."""
    own.until("progress")
    assert wait_until(lambda: len(processes_of(own.process.pid)) > 2, START_TIMEOUT_S)
    everything = processes_of(own.process.pid)
    assert own.stop() == 130
    assert not [pid for pid in everything if is_alive(pid)]


@pytest.mark.parametrize("room", ["embedder", "cost"])
def test_a_daemon_that_dies_is_started_again(victim: Up, room: str) -> None:
    """kill -9 of a daemon is told in one line, and it serves again."""
    os.kill(victim.daemon_pid(room), signal.SIGKILL)
    told = victim.until("notice")["message"]
    assert room in told
    assert "SIGKILL" in told
    assert "\n" not in told
    assert "serving again" in victim.until("notice")["message"]
    assert _accepts(victim.environment[f"TOLLGATE_{room.upper()}_ADDRESS"])


def test_the_database_that_dies_is_started_again(victim: Up) -> None:
    """kill -9 of the embedded PostgreSQL is told in one line, and commands work again."""
    pid_file = Path(
        victim.environment["TOLLGATE_STATE_DIR"], "postgres/cluster/data/postmaster.pid"
    )
    os.kill(int(pid_file.read_text().split()[0]), signal.SIGKILL)
    assert "database" in victim.until("notice")["message"]
    assert wait_until(
        lambda: tollgate("limits", environment=victim.environment).returncode == 0, START_TIMEOUT_S
    )


def test_a_second_up_says_that_one_is_running(running: Up) -> None:
    """The same state directory is not used twice; the line says who uses it."""
    second = tollgate("up", environment=running.environment)
    assert second.returncode == 1
    assert "already running" in second.stderr
    assert f"pid {running.process.pid}" in second.stderr
    assert len(second.stderr.strip().splitlines()) == 1


def test_a_port_in_use_is_one_line_before_anything_starts(tmp_path: Path) -> None:
    """The line names the port, who wants it and what to do, and no process was started."""
    environment = environment_of(tmp_path / "state")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        environment["TOLLGATE_EMBEDDER_ADDRESS"] = f"127.0.0.1:{port}"
        refused = tollgate("up", environment=environment)
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    for word in (str(port), "embedder", f"pid {os.getpid()}", "TOLLGATE_EMBEDDER_ADDRESS"):
        assert word in refused.stderr
    assert not (tmp_path / "state" / "postgres").exists()


def test_two_daemons_on_one_address_are_told_apart_before_the_start() -> None:
    """A mistake in the settings is named with both daemons."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    (fault,) = faults({"cost": address, "parser": address})
    assert "cost" in fault
    assert "parser" in fault


def test_an_address_of_another_machine_cannot_be_listened_on() -> None:
    """192.0.2.1 (RFC 5737) is nobody's, so certainly not ours."""
    (fault,) = faults({"storage": "192.0.2.1:50054"})
    assert "no address of this machine" in fault


def test_a_state_directory_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    """A file where the directory should be: said with what to do, root or not."""
    (tmp_path / "state").write_text("a file")
    refused = tollgate("up", environment=environment_of(tmp_path / "state"))
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "TOLLGATE_STATE_DIR" in refused.stderr


def test_a_daemon_that_cannot_start_is_one_line_with_its_own_words(tmp_path: Path) -> None:
    """A setting that only the daemon knows to be wrong is shown as the daemon said it."""
    environment = environment_of(tmp_path / "state") | {"TOLLGATE_EMBEDDER_PROVIDERS": "nobody"}
    refused = tollgate("up", environment=environment)
    assert refused.returncode == 1
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "TOLLGATE_EMBEDDER_PROVIDERS" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_faults_of_all_daemons_are_told_together(tmp_path: Path) -> None:
    """Settings of two daemons are wrong: one start names them all, each once, never a value."""
    wrong = {
        "TOLLGATE_ROUTER_MODE": "s3cret",
        "TOLLGATE_ROUTER_ATTEMPTS_MAX": "s3cret",
        "TOLLGATE_EMBEDDER_PROVIDERS": "nobody",
    }
    refused = tollgate("up", environment=environment_of(tmp_path / "state") | wrong)
    assert refused.returncode == 1
    for variable in wrong:
        assert refused.stderr.count(variable) == 1, refused.stderr
    assert "s3cret" not in refused.stderr


def test_wrong_settings_are_a_wrong_use(tmp_path: Path) -> None:
    """Wrong variables, shared or of a daemon, are named, never their values; exit code 2."""
    wrong = {"TOLLGATE_GRACE_S": "s3cret", "TOLLGATE_ROUTER_MODE": "s3cret"}
    refused = tollgate("up", environment=environment_of(tmp_path) | wrong)
    assert refused.returncode == 2
    for variable in wrong:
        assert refused.stderr.count(variable) == 1, refused.stderr
    assert "s3cret" not in refused.stderr


def test_logs_are_kept_apart_bounded_and_as_json(running: Up) -> None:
    """Every daemon has a log of its own in the state directory, one JSON object a line."""
    for room in ROOMS:
        log = Path(running.environment["TOLLGATE_STATE_DIR"], "logs", f"{room}.jsonl")
        lines = log.read_text().splitlines()
        assert any(json.loads(line)["message"] == "serving" for line in lines), room


def test_the_line_for_reflection_works_as_printed(running: Up) -> None:
    """What is printed lists the backends, by a shell, from this directory."""
    router = running.environment["TOLLGATE_ROUTER_ADDRESS"]
    line = by_reflection(router)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "minilm" in done.stdout


def test_every_line_to_try_works_as_printed(tmp_path: Path) -> None:
    """With keys and a state directory elsewhere, a bare shell that types what is printed gets on.

    The lines are typed one after the other, in this directory, and each must end well.
    """
    environment = environment_of(tmp_path / "a state")
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "up"],
        env=environment | {"TOLLGATE_ROUTER_AUTHENTICATION": "keys"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line.rstrip())
            if "Ctrl-C stops" in line:
                break
        begin = next(i for i, line in enumerate(said) if line.startswith("Try it"))
        lines = [line for line in said[begin:-1] if line and not line.endswith(":")]
        # Traces come a second after the call.
        lines = [f"sleep 2; {line}" if " trace " in line else line for line in lines]
        assert len(lines) > 10, said
        bare = {k: v for k, v in environment.items() if not k.startswith("TOLLGATE_")}
        script = "set -e\n" + "\n".join(lines)
        done = subprocess.run(
            ["sh", "-c", script], env=bare, capture_output=True, text=True, check=False, timeout=120
        )
        assert done.returncode == 0, (lines, done.stdout, done.stderr)
        assert "minilm" in done.stdout
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=STOP_TIMEOUT_S)


def test_the_last_error_of_a_log_is_its_last_complaint(tmp_path: Path) -> None:
    """A plain line (an interpreter's) goes before JSON, errors before information."""
    log = tmp_path / "x.jsonl"
    log.write_text(
        '{"level": "critical", "message": "of a run before"}\n'
        '{"level": "error", "message": "first"}\n'
        '{"level": "critical", "message": "cannot start", "error": "KeyError", "from": "a.py:1"}\n'
        '{"level": "info", "message": "stopped"}\n'
    )
    assert last_error(log, 0) == "cannot start KeyError a.py:1"
    with log.open("a") as file:
        file.write("ModuleNotFoundError: No module named 'liteparse'\n")
    assert last_error(log, 0) == "ModuleNotFoundError: No module named 'liteparse'"
    assert last_error(tmp_path / "none", 0) == ""
