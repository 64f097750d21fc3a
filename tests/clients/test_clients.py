"""Clients that share no code with Tollgate: one in Go from the protos, two by reflection alone.

Each is a program of its own, run against a mesh that `tollgate up` started.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.rpc import error_details_pb2

from chassis.probe import probe
from tests.running import Up, environment_of, tollgate

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = "all-MiniLM-L6-v2"
GRPCURL = "github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3"
# Trimmed of its path a source is found in Go's cache the next time; without C less is built.
_GO = {"GOFLAGS": "-trimpath -buildvcs=false", "CGO_ENABLED": "0", "GOWORK": "off"}
# What the Go tools say when there is no way to the module proxy.
_UNREACHABLE = re.compile(r"dial tcp|no such host|proxyconnect|i/o timeout|module lookup disabled")

BACKENDS = {
    ("corpus", "corpus"),
    ("embedder", "minilm"),
    ("embedder", "mock"),
    ("parser", "local"),
    ("parser", "mock"),
    ("storage", "filesystem"),
    ("storage", "mock"),
    ("storage", "pgvector"),
}


@dataclass(frozen=True, slots=True)
class Mesh:
    """A mesh that runs, and the environment that leads the command to it."""

    addresses: Mapping[str, str]
    environment: dict[str, str]

    @property
    def router(self) -> str:
        """The one address for clients."""
        return self.addresses["router"]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    """One mesh for all clients."""
    up = Up.start(environment_of(tmp_path_factory.mktemp("clients") / "state"))
    try:
        yield Mesh(up.until("serving")["addresses"], up.environment)
        assert up.stop() == 0
    finally:
        up.end()


def done(*command: str, cwd: Path | None = None) -> str:
    """The standard output of a command that must succeed, but for a module proxy out of reach."""
    run = subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | _GO,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if run.returncode != 0 and _UNREACHABLE.search(run.stderr):
        pytest.skip("the Go module proxy cannot be reached, and the cache lacks what is needed")
    assert run.returncode == 0, run.stderr
    return run.stdout


def buf() -> str:
    """The buf of this environment, or of the PATH."""
    beside = Path(sys.executable).with_name("buf")
    found = str(beside) if beside.exists() else shutil.which("buf")
    if found is None:
        pytest.skip("buf is not installed: `make setup` installs it")
    return found


def go() -> str:
    """The Go tool."""
    found = shutil.which("go")
    if found is None:
        pytest.skip("go is not installed")
    return found


# --- a client in another language, from the protos -------------------------------------------


@pytest.fixture(scope="module")
def go_client(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The client in Go, built from its source and stubs that buf makes of the protos."""
    go_tool, buf_tool = go(), buf()
    source = tmp_path_factory.mktemp("go") / "client"
    shutil.copytree(HERE / "go", source, ignore=shutil.ignore_patterns("pb", "client"))
    done(buf_tool, "generate", str(ROOT), cwd=source)
    done(go_tool, "build", "-o", "client", ".", cwd=source)
    return str(source / "client")


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("model", "mode", "provider"),
    [(MODEL, (), "minilm"), ("text-embedding-3-small", ("MOCK",), "mock")],
    ids=["genuine", "mock"],
)
def test_a_client_in_go_goes_through_the_router(
    running: Mesh, go_client: str, model: str, mode: tuple[str, ...], provider: str
) -> None:
    """A client from the protos embeds, reads provenance and receipt, and branches on a reason."""
    found: dict[str, Any] = json.loads(done(go_client, running.router, model, *mode))
    assert found["provider"] == provider
    assert found["simulated"] is (provider == "mock")
    assert found["dimensions"] == (1536 if provider == "mock" else 384)
    # What runs here is free; a mock has the price of what it stands for.
    assert (found["held_nanos_usd"] > 0) is (provider == "mock")
    assert found["hold_id"]
    assert found["request_id"]
    assert found["receipt_trailer"] is True
    assert {(b["service"], b["provider"]) for b in found["backends"]} == BACKENDS
    assert found["refusal"] == {"code": "NotFound", "domain": "tollgate", "reason": "NOT_FOUND"}


# --- clients that know nothing beforehand ----------------------------------------------------


def by_reflection(kind: str, tool: str, router: str) -> None:
    """Run the script with one of the tools, and check what each of its calls answered."""
    lines = done("bash", str(HERE / "reflect.sh"), kind, tool, router, MODEL).splitlines()
    services, backends, embedded, refused = lines
    assert {"tollgate.router.v1.RouterService", "tollgate.corpus.v1.CorpusService"} <= set(
        services.split()
    )
    listed = {(b["service"], b["provider"]) for b in json.loads(backends)["backends"]}
    assert listed == BACKENDS
    answer = json.loads(embedded.replace("holdId", "hold_id"))  # buf has camels, grpcurl has not
    assert len(answer["vectors"][0]["values"]) == 384
    assert answer["provenance"]["provider"] == "minilm"
    assert not answer["provenance"].get("simulated", False)
    assert answer["receipt"]["hold_id"]
    assert reason_of(kind, refused) == "NOT_FOUND"


def reason_of(kind: str, refused: str) -> str:
    """The reason of the ErrorInfo in an error, as a tool prints it."""
    if kind == "grpcurl":
        found = re.search(r'google\.rpc\.ErrorInfo".*?"reason": "(\w+)"', refused)
        assert found is not None, refused
        return found[1]
    details = {detail["type"]: detail["value"] for detail in json.loads(refused)["details"]}
    packed = details["google.rpc.ErrorInfo"]
    info = error_details_pb2.ErrorInfo.FromString(b64decode(packed + "=" * (-len(packed) % 4)))
    return str(info.reason)


def test_buf_curl_needs_nothing_but_reflection(running: Mesh) -> None:
    """`buf curl` lists services and backends, embeds a text, and shows the reason of an error."""
    by_reflection("buf", buf(), running.router)


@pytest.mark.timeout(400)
def test_grpcurl_needs_nothing_but_reflection(
    running: Mesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """grpcurl, which asks for reflection v1 first, does the same."""
    tool = shutil.which("grpcurl")
    if tool is None:
        if shutil.which("go") is None:
            pytest.skip("neither grpcurl nor go, which could install it, is installed")
        monkeypatch.setenv("GOBIN", str(tmp_path))
        done(go(), "install", GRPCURL)
        tool = str(tmp_path / "grpcurl")
    by_reflection("grpcurl", tool, running.router)


def test_a_daemon_is_debugged_with_a_token(running: Mesh) -> None:
    """Behind the router a foreign client is refused, and let in with what `tollgate token` says."""
    address = running.addresses["cost"]
    curl = [buf(), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    url = f"http://{address}/tollgate.cost.v1.LimitService/ListLimits"
    refused = subprocess.run([*curl, url], capture_output=True, text=True, timeout=30)
    assert refused.returncode != 0
    assert "unauthenticated" in refused.stderr
    header = tollgate("token", "--tenant", "acme", environment=running.environment).stdout.strip()
    limits = json.loads(done(*curl, "-H", header, url))["limits"]
    assert {"default-day", "default-hour"} <= {limit["id"] for limit in limits}


# --- what the page for operators promises of daemons that run ---------------------------------


def test_every_health_name_of_the_page_is_told(running: Mesh) -> None:
    """Each daemon answers SERVING under each name that docs/operations.md gives it."""
    page = (ROOT / "docs" / "operations.md").read_text()
    rows = re.findall(r"^\| (\w+) \| (`tollgate\..*) \|$", page, re.MULTILINE)
    assert {room for room, _ in rows} == running.addresses.keys()
    for room, names in rows:
        for name in ("", *re.findall(r"`(tollgate[^`]+)`", names)):
            assert probe(running.addresses[room], name) == "SERVING", f"{room}: {name}"
