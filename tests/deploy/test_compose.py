"""The compose file says what the code says: names, ports, commands, variables, who needs whom."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from chassis.settings import MeshSettings, load
from tests.deploy.variables import ROOMS, ROOT, all_variables, settings_of, variables

FILE = ROOT / "docker-compose.yml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
COMPOSE_GO = "github.com/compose-spec/compose-go/v2/cmd@v2.16.2"

# What the image names itself, and where a daemon's user may write in it.
IMAGE_ENVIRONMENT = {"TOLLGATE_STATE_DIR": "/var/lib/tollgate"}


def source_of(room: str) -> str:
    """What a room's main.py says."""
    return (ROOT / "services" / room / "main.py").read_text()


def dialled_by(room: str) -> set[str]:
    """The rooms whose addresses a room uses."""
    found = set(re.findall(r"mesh\.(\w+)_address", source_of(room)))
    assert found <= set(ROOMS)
    return found


def uses_database(room: str) -> bool:
    """Whether a room has tables of its own."""
    return (ROOT / "services" / room / "migrations").is_dir()


def needed_by(service: str) -> set[str]:
    """Everything that is healthy before a service starts."""
    direct = set(SERVICES[service].get("depends_on", {}))
    return direct.union(*map(needed_by, direct))


def test_the_services_are_the_rooms_and_what_they_stand_on() -> None:
    """There is one service for each daemon of the code, and none that is not known."""
    assert SERVICES.keys() == {*ROOMS, "postgres", "collector"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_service_runs_its_room(room: str) -> None:
    """The command starts the module of its own room, and that module can be wired."""
    python, dash_m, module = SERVICES[room]["command"]
    assert (python, dash_m, module) == ("python", "-m", f"services.{room}.main")
    assert callable(import_module(module).wire)


@pytest.mark.parametrize("room", ROOMS)
def test_a_service_sets_only_variables_that_its_room_reads(room: str) -> None:
    """Every variable is a setting of the mesh or of the room, or the file of one."""
    own = {v.name for kind in (MeshSettings, settings_of(room)) for v in variables(kind)}
    own |= {v.name for v in all_variables() if v.name.startswith(f"TOLLGATE_{room.upper()}_")}
    own |= {f"{name}_FILE" for name in own}
    assert set(SERVICES[room]["environment"]) - own == set()


@pytest.mark.parametrize("room", ROOMS)
def test_a_daemon_accepts_its_environment(
    room: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The settings load from the environment of compose and image, secrets from their files."""
    monkeypatch.chdir(tmp_path)
    environment = IMAGE_ENVIRONMENT | SERVICES[room]["environment"]
    for name, value in environment.items():
        assert isinstance(value, str), f"{name}: YAML makes {value!r} of it: quote it"
        mounted = Path(value)
        if name.endswith("_FILE"):
            assert mounted.parent == Path("/run/secrets")
            assert mounted.name in SERVICES[room]["secrets"], f"{name}: there is no such file"
            value = str(tmp_path / mounted.name)
            Path(value).write_text("postgresql://tollgate:x@postgres:5432/tollgate\n")
        monkeypatch.setenv(name, value)
    mesh, own = load(MeshSettings, settings_of(room))
    assert mesh.mesh_secret is not None
    assert (mesh.database_url is not None) == uses_database(room)
    assert own.listen == f"0.0.0.0:{port_of(room)}"


def port_of(room: str) -> str:
    """The port of a daemon by default."""
    address: str = MeshSettings.model_fields[f"{room}_address"].default
    return address.rpartition(":")[2]


@pytest.mark.parametrize("room", ROOMS)
def test_a_daemon_is_dialled_where_it_listens(room: str) -> None:
    """Peers find each daemon by its service's name, at its default port, where it listens."""
    port = port_of(room)
    assert SERVICES[room]["environment"][f"TOLLGATE_{room.upper()}_LISTEN"] == f"0.0.0.0:{port}"
    for other in ROOMS:
        dialled = SERVICES[other]["environment"][f"TOLLGATE_{room.upper()}_ADDRESS"]
        assert dialled == f"{room}:{port}"


@pytest.mark.parametrize("room", ROOMS)
def test_health_is_asked_where_the_daemon_listens(room: str) -> None:
    """The health check probes the room's own port with the probe of the image."""
    asked = SERVICES[room]["healthcheck"]["test"]
    assert asked == ["CMD", "python", "-m", "chassis.probe", f"127.0.0.1:{port_of(room)}"]
    assert callable(import_module("chassis.probe").main)


@pytest.mark.parametrize("room", ROOMS)
def test_a_daemon_starts_after_what_it_dials(room: str) -> None:
    """A room waits for the health of all that it dials, but for what itself waits for it."""
    for other in dialled_by(room):
        assert other in needed_by(room) or room in needed_by(other), f"{room} dials {other}"
    if uses_database(room):
        assert "postgres" in needed_by(room)
    for condition in SERVICES[room].get("depends_on", {}).values():
        assert condition == {"condition": "service_healthy"}


@pytest.mark.parametrize("room", ROOMS)
def test_a_daemon_has_only_the_secrets_that_it_needs(room: str) -> None:
    """Each has the mesh secret; the database's url goes only where there are tables."""
    wanted = {"mesh_secret", *(["database_url"] if uses_database(room) else [])}
    assert set(SERVICES[room]["secrets"]) == wanted


def test_secrets_are_files_that_git_does_not_see() -> None:
    """Every secret is a file below deploy/secrets, ignored by git; none is written down."""
    assert "/deploy/secrets/" in (ROOT / ".gitignore").read_text().splitlines()
    used = {name for service in SERVICES.values() for name in service.get("secrets", [])}
    assert COMPOSE["secrets"].keys() == used
    for name, secret in COMPOSE["secrets"].items():
        assert secret == {"file": f"deploy/secrets/{name}"}
        assert f"deploy/secrets/{name} " in FILE.read_text(), f"{name}: the head says nothing of it"
    for service in SERVICES.values():
        for name in service.get("environment", {}):
            assert not re.search("PASSWORD|SECRET|DATABASE_URL", name) or name.endswith("_FILE")


def test_only_the_router_is_reached_from_outside() -> None:
    """The router alone publishes its port, on loopback, and asks for keys."""
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    port = port_of("router")
    assert published == {"router": [f"127.0.0.1:{port}:{port}"]}
    assert SERVICES["router"]["environment"]["TOLLGATE_ROUTER_AUTHENTICATION"] == "keys"


@pytest.mark.parametrize("room", ROOMS)
def test_a_daemon_runs_with_nothing_that_it_does_not_need(room: str) -> None:
    """The root is read-only, capabilities are dropped, and no privilege can be gained."""
    service = SERVICES[room]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    assert "user" not in service  # The image's own.


@pytest.mark.parametrize("room", ROOMS)
def test_a_daemon_has_the_time_that_it_needs_to_stop(room: str) -> None:
    """It is killed only after its drain, its calls, their settlements and its jobs had theirs."""
    drain_s = float(SERVICES[room]["environment"]["TOLLGATE_DRAIN_S"])
    grace_s = float(MeshSettings.model_fields["grace_s"].default)
    allowed = SERVICES[room]["stop_grace_period"]
    assert allowed.endswith("s")
    assert float(allowed[:-1]) >= drain_s + 3 * grace_s + 5


def test_what_is_kept_has_a_volume() -> None:
    """Each volume is mounted once, and those of daemons at the image's state directory."""
    mounted = [
        volume.split(":")
        for service in SERVICES.values()
        for volume in service.get("volumes", [])
        if not volume.startswith(".")
    ]
    assert sorted(name for name, _ in mounted) == sorted(COMPOSE["volumes"])
    state_dir = IMAGE_ENVIRONMENT["TOLLGATE_STATE_DIR"]
    for room in ("embedder", "storage", "router"):
        assert any(volume.endswith(f":{state_dir}") for volume in SERVICES[room]["volumes"])


def test_the_collector_gets_its_own_configuration() -> None:
    """The collector reads deploy/collector.yaml, and daemons send where that listens."""
    collector = SERVICES["collector"]
    assert collector["volumes"] == ["./deploy/collector.yaml:/etc/collector.yaml:ro"]
    assert collector["command"] == ["--config=/etc/collector.yaml"]
    configuration = yaml.safe_load((ROOT / "deploy" / "collector.yaml").read_text())
    endpoint = configuration["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"]
    for room in ROOMS:
        sent_to = SERVICES[room]["environment"]["TOLLGATE_OTLP_ENDPOINT"]
        assert sent_to == f"http://collector:{endpoint.rpartition(':')[2]}"


def test_the_collector_runs_only_what_is_defined() -> None:
    """Pipelines refer to components that the configuration has, and use all of them."""
    configuration = yaml.safe_load((ROOT / "deploy" / "collector.yaml").read_text())
    assert configuration.keys() == {"receivers", "processors", "exporters", "service"}
    pipelines = configuration["service"]["pipelines"]
    assert pipelines.keys() == {"traces", "metrics"}
    for kind in ("receivers", "processors", "exporters"):
        used = {name for pipeline in pipelines.values() for name in pipeline[kind]}
        assert used == configuration[kind].keys()
    for pipeline in pipelines.values():
        assert pipeline["processors"][0] == "memory_limiter", "the limiter goes first"


def test_versions_are_pinned() -> None:
    """No image floats: each has a tag that is a version."""
    for service in SERVICES.values():
        assert re.search(r":\d+\.\d+\.\d+", service["image"])
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    assert {SERVICES[room]["image"] for room in ROOMS} == {f"tollgate:{version[1]}"}


@pytest.mark.timeout(300)
def test_the_reference_loader_takes_the_file() -> None:
    """The loader of Docker Compose itself (compose-go) finds the file valid and consistent."""
    if shutil.which("go") is None:
        pytest.skip("go is not installed: it runs compose-go, the loader of Docker Compose")
    # Nothing is written: go keeps modules and the built program in caches of its own.
    run = subprocess.run(
        ["go", "run", COMPOSE_GO, "--format", "json", str(FILE)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    if "dial tcp" in run.stderr or "no such host" in run.stderr:
        pytest.skip("the Go module proxy cannot be reached, and compose-go is not in the cache")
    assert run.returncode == 0, run.stderr
    # It prints faults on standard output and exits with 0.
    assert run.stdout.startswith("{"), run.stdout
    assert json.loads(run.stdout)["services"].keys() == SERVICES.keys()


def test_the_compose_specification_takes_the_file() -> None:
    """A second reader of the specification, which is stricter on types, finds the file valid."""
    compose_spec = pytest.importorskip(
        "compose_spec", reason="the package compose-spec is not installed"
    )
    parsed = compose_spec.PyCompose.from_json(json.dumps(COMPOSE))
    assert set(parsed.service_names()) == SERVICES.keys()
