"""The gate's speed: `Embed` through router, ledger and mock embedder, against a bare relay.

Every daemon is a process of its own on the embedded database, and so is the load; tracing is on,
sampled at 10 %. A run counts only if every answer was OK and as many holds were settled.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import grpc
from tollgate.cost.v1 import usage_pb2, usage_pb2_grpc
from tollgate.embedder.v1 import embedder_pb2
from tollgate.router.v1 import router_pb2, router_pb2_grpc

from bench.relay import ECHO
from chassis.call import IDENTITY, PROVIDER, TENANT, Call
from chassis.identity import sign
from chassis.probe import probe

METHOD = "tollgate.embedder.v1.EmbedderService/Embed"
SECRET = "the secret of a bench"
TENANT_NAME = "bench"
IN_FLIGHT = (1, 16, 64, 256)
_START_S = 60.0
_SETTLED_S = 20.0


class BenchError(Exception):
    """A run does not count. The message says why."""


@dataclass(slots=True)
class Mesh:
    """The processes under measurement."""

    ports: dict[str, int]
    sent: int = 0
    """Calls sent through the gate, the warm-up's included."""
    pids: dict[str, int] = field(default_factory=dict)

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"


def request() -> bytes:
    """One short text, 384 dimensions."""
    text = "how do I reset the password of my account when the mail never comes"
    return embedder_pb2.EmbedRequest(model="mock-384", inputs=[text]).SerializeToString()


def identity() -> dict[str, str]:
    """What lets a caller past the router, straight to a daemon."""
    call = Call(TENANT_NAME, request_id="bench")
    return {IDENTITY: sign(call, SECRET.encode(), lifetime_s=3_600), PROVIDER: "mock"}


@contextmanager
def mesh(*, only: tuple[str, ...] = ()) -> Iterator[Mesh]:
    """Echo, relay, embedder, cost and router, each a process, on a database of their own."""
    names = ("echo", "relay", "embedder", "cost", "router")
    started = Mesh({name: _free_port() for name in names})
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-") as directory, ExitStack() as stack:
        env = _env(started, directory)
        method, headers = METHOD, json.dumps(identity())
        commands = {
            "echo": ["bench.relay", "echo", started.address("echo")],
            "embedder": ["services.embedder.main"],
            "relay": [
                *("bench.relay", "relay", started.address("relay")),
                *(started.address("embedder"), method, headers),
            ],
            "cost": ["services.cost.main"],
            "router": ["services.router.main"],
        }
        for name, command in commands.items():
            if not only or name in only:
                log = Path(directory) / f"{name}.log"
                process = stack.enter_context(_running(command, env, log))
                started.pids[name] = process.pid
                if name in ("embedder", "cost", "router"):
                    _until_serving(started.address(name), process, log)
        if "router" in started.pids:
            _until_able(started)
        yield started


def measure(seconds: float = 3.0, rounds: int = 2) -> dict[str, float]:
    """The figures of one run, each a median over rounds. Raises BenchError."""
    with mesh() as running:
        found: dict[str, list[float]] = {}
        for _ in range(rounds):
            for name, value in _round(running, seconds).items():
                found.setdefault(name, []).append(value)
        _check_settled(running)
        figures = {name: median(values) for name, values in found.items()}
    for count in (64, 256):
        figures[f"gate_relay_ratio_{count}"] = (
            figures[f"gate_rps_{count}"] / (figures[f"relay_rps_{count}"])
        )
    figures["gate_echo_ratio_64"] = figures["gate_rps_64"] / figures["echo_rps_64"]
    figures["gate_p50_added_ms_1"] = figures["gate_p50_ms_1"] - figures["direct_p50_ms_1"]
    return figures


def _round(running: Mesh, seconds: float) -> dict[str, float]:
    figures: dict[str, float] = {}
    echoed = run(running.address("echo"), ECHO, {}, 64, seconds)
    figures["echo_rps_64"] = echoed["rps"]
    direct = run(running.address("embedder"), METHOD, identity(), 1, seconds / 2)
    figures["direct_p50_ms_1"] = direct["p50_ms"]
    for count in IN_FLIGHT:
        if count in (64, 256):
            relayed = run(running.address("relay"), METHOD, {}, count, seconds)
            figures[f"relay_rps_{count}"] = relayed["rps"]
        passed = through_gate(running, count, seconds)
        figures[f"gate_rps_{count}"] = passed["rps"]
        figures[f"gate_p50_ms_{count}"] = passed["p50_ms"]
        figures[f"gate_p99_ms_{count}"] = passed["p99_ms"]
    return figures


def through_gate(running: Mesh, in_flight: int, seconds: float) -> dict[str, Any]:
    """One run through the gate."""
    metadata = {TENANT: TENANT_NAME}
    found = run(running.address("router"), METHOD, metadata, in_flight, seconds, slack_bytes=24)
    running.sent += found["sent"]
    return found


def run(
    address: str,
    method: str,
    metadata: dict[str, str],
    in_flight: int,
    seconds: float,
    *,
    slack_bytes: int = 0,
) -> dict[str, Any]:
    """One closed loop from a process of its own. Raises BenchError unless every answer was OK.

    `slack_bytes` is by how much answers may differ in size.
    """
    plan = {
        "address": address,
        "method": method,
        "request_hex": request().hex(),
        "metadata": metadata,
        "in_flight": in_flight,
        "seconds": seconds,
        "slack_bytes": slack_bytes,
    }
    command = [sys.executable, "-m", "bench.load", json.dumps(plan)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    if found["outcomes"] != {"OK": found["sent"]}:
        raise BenchError(f"{method} at {in_flight} in flight: {found['outcomes']}")
    return found


def _check_settled(running: Mesh) -> None:
    """As many holds settled as calls were sent, and none open."""
    until, settled = time.monotonic() + _SETTLED_S, -1
    while settled != running.sent and time.monotonic() < until:
        time.sleep(0.2)
        settled = settled_holds(running)
    if settled != running.sent:
        raise BenchError(f"{running.sent} calls were answered, {settled} holds are settled")


def settled_holds(running: Mesh) -> int:
    """How many holds of the bench's tenant the ledger has charged."""
    with grpc.insecure_channel(running.address("cost")) as channel:
        stub: Any = usage_pb2_grpc.UsageServiceStub(channel)  # type: ignore[arg-type]  # not aio
        answer = stub.QueryUsage(
            usage_pb2.QueryUsageRequest(tenant=TENANT_NAME),
            metadata=list(identity().items()),
            timeout=10,
        )
    return sum(row.charges for row in answer.rows)


def _until_able(running: Mesh) -> None:
    """The router knows its backends, and the ledger its prices."""

    def able() -> bool:
        with grpc.insecure_channel(running.address("router")) as channel:
            stub: Any = router_pb2_grpc.RouterServiceStub(channel)  # type: ignore[arg-type]  # not aio
            answer = stub.ListBackends(router_pb2.ListBackendsRequest(), timeout=5)
        return any(
            backend.provider == "mock" and backend.health == router_pb2.BACKEND_HEALTH_SERVING
            for backend in answer.backends
            if backend.service == "embedder"
        )

    _until(able, "the router does not see the embedder")


def _until_serving(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    def serving() -> bool:
        if process.poll() is not None:
            raise BenchError(f"{log.stem} did not start: {log.read_text()[-2000:]}")
        return probe(address) == "SERVING"

    _until(serving, f"{log.stem} does not serve")


def _until(true: Callable[[], bool], fault: str) -> None:
    until = time.monotonic() + _START_S
    while not true():
        if time.monotonic() > until:
            raise BenchError(fault)
        time.sleep(0.05)


@contextmanager
def _running(
    command: list[str], env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen([sys.executable, "-m", *command], env=env, stderr=out)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _env(started: Mesh, directory: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("TOLLGATE_")}
    env |= {
        "TOLLGATE_STATE_DIR": f"{directory}/state",
        "TOLLGATE_MESH_SECRET": SECRET,
        "TOLLGATE_TRACE_SAMPLE_RATIO": "0.1",
        "TOLLGATE_EMBEDDER_PROVIDERS": "mock",
        "TOLLGATE_ROUTER_MODE": "MOCK",
    }
    for name in ("embedder", "cost", "router"):
        env[f"TOLLGATE_{name.upper()}_ADDRESS"] = started.address(name)
        env[f"TOLLGATE_{name.upper()}_LISTEN"] = started.address(name)
    return env


def _free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port: int = bound.getsockname()[1]
        return port


if __name__ == "__main__":
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 4.0
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(json.dumps(measure(seconds, rounds), indent=2))
