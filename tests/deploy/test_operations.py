"""The page for operators says what the code does: settings, metrics, errors, ports, health."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest

from chassis import call
from chassis.errors import BY_REASON
from chassis.settings import MeshSettings, load
from cli import terminal
from services.cost.main import SERVICES as LEDGER
from services.router.core.routes import Kind
from services.router.main import SERVICE as GATE
from services.router.main import Settings as GateSettings
from services.router.main import default_routes
from tests.deploy.variables import ROOMS, ROOT, Variable, all_variables, command_variables

PAGE = (ROOT / "docs" / "operations.md").read_text()
CODE = [
    path
    for folder in ("chassis", "services", "cli")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


def section(title: str) -> str:
    """The part of the page under a heading."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(title: str) -> dict[str, list[str]]:
    """The rows of a section's tables by the name, in code font, that they begin with."""
    found = {}
    for line in section(title).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| `") and len(cells) > 1:
            found[cells[0].split("`")[1]] = cells
    return found


SETTINGS, METRICS, ERRORS = rows("Settings"), rows("Metrics"), rows("Errors")


_CREATES = re.compile(r"create_(observable_)?(counter|up_down_counter|histogram|gauge)$")


def instruments() -> dict[str, str]:
    """The unit of every instrument that the code creates, by name."""
    found = {}
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if not _CREATES.match(node.func.attr):
                continue
            given = {word.arg: word.value for word in node.keywords}
            name = node.args[0] if node.args else given["name"]
            found[ast.literal_eval(name)] = (
                ast.literal_eval(given["unit"]) if "unit" in given else ""
            )
    return found


INSTRUMENTS = instruments()


@pytest.mark.parametrize("variable", all_variables(), ids=lambda variable: variable.name)
def test_every_setting_is_on_the_page_with_its_default(variable: Variable) -> None:
    """Each setting of the mesh, a room or a provider has a row with its default and its meaning."""
    expected = f"| `{variable.name}` | `{variable.default}` | {variable.description} |"
    assert variable.name in SETTINGS, f"docs/operations.md lacks the row {expected}"
    cells = SETTINGS[variable.name]
    assert cells[1] == f"`{variable.default}`", f"docs/operations.md is not like {expected}"
    assert len(cells[2]) > 10, f"{variable.name}: docs/operations.md does not say what it does"


def test_the_backends_on_the_page_are_the_default_but_for_one_mock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The example of TOLLGATE_ROUTER_BACKENDS loads, and differs in the embedder's mock alone."""
    listed = tmp_path / "backends.json"
    listed.write_text(section("Settings").split("```json\n")[1].split("```")[0])
    monkeypatch.setenv("TOLLGATE_ROUTER_BACKENDS_FILE", str(listed))
    mesh, gate = load(MeshSettings, GateSettings)
    assert gate.backends is not None
    routes, default = [backend.route() for backend in gate.backends], default_routes(mesh)
    (elsewhere,) = set(routes) - set(default)
    (before,) = set(default) - set(routes)
    assert len(routes) == len(default)
    assert (elsewhere.service, elsewhere.kind) == ("embedder", Kind.MOCK)
    assert replace(elsewhere, address=before.address) == before


def test_the_page_names_no_variable_that_the_code_does_not_know() -> None:
    """Whatever begins with TOLLGATE_ on the page is read by the code, as itself or as a file."""
    known = {variable.name for variable in all_variables()} | command_variables()
    known |= {f"{name}_FILE" for name in known}
    named = set(re.findall(r"\bTOLLGATE_[A-Z0-9_]*[A-Z0-9]\b(?!_?[<*…])", PAGE))
    assert len(named) > 50, "the pattern finds nothing"
    assert named - known == set()


def test_every_variable_of_the_command_is_on_the_page() -> None:
    """What the command reads besides the settings is on the page too."""
    assert command_variables() - SETTINGS.keys() == set()


def test_every_metric_is_on_the_page_with_its_unit() -> None:
    """Each instrument that the code creates has a row with its unit, and no row is of none."""
    assert "rpc.server.call.duration" in INSTRUMENTS, "the search finds nothing"
    assert {name: cells[1].strip("`") for name, cells in METRICS.items()} == INSTRUMENTS


def test_every_attribute_of_a_metric_is_one_that_the_code_sets() -> None:
    """The attributes that the page gives a metric are written in the code."""
    written = "".join(path.read_text() for path in CODE)
    for name, cells in METRICS.items():
        for attribute in re.findall(r"`([\w.]+)`", cells[2]):
            assert f'"{attribute}"' in written, f"{name}: nobody sets {attribute}"


@pytest.mark.parametrize("reason", sorted(BY_REASON))
def test_every_error_reason_is_on_the_page_with_its_code(reason: str) -> None:
    """Each reason has a row with the gRPC code that carries it."""
    assert reason in ERRORS, f"docs/operations.md lacks {reason}"
    assert ERRORS[reason][1] == f"`{BY_REASON[reason].code}`"


def test_the_page_names_no_error_reason_that_does_not_exist() -> None:
    """The table of errors has a row for each reason of the code and no other."""
    assert ERRORS.keys() == BY_REASON.keys()


@pytest.mark.parametrize("room", ROOMS)
def test_every_port_is_on_the_page(room: str) -> None:
    """Each daemon has a row with the port that it listens on, and is dialled at, by default."""
    defaults = {variable.name: variable.default for variable in all_variables()}
    listen = defaults[f"TOLLGATE_{room.upper()}_LISTEN"]
    assert listen == defaults[f"TOLLGATE_{room.upper()}_ADDRESS"]
    assert rows("Ports")[room][1] == f"`{listen.rpartition(':')[2]}`"


def test_every_health_name_is_on_the_page() -> None:
    """Each name that a daemon tells its health under is on the page, and no other is."""
    routes = default_routes(MeshSettings())
    served = {f"{route.grpc_service}/{route.provider}" for route in routes}
    served |= {route.grpc_service for route in routes} | {GATE, *LEDGER}
    assert set(re.findall(r"`(tollgate\.[\w.]+(?:/\w+)?)`", section("Health"))) == served


def test_the_page_says_what_exit_codes_mean() -> None:
    """Each exit code of a daemon and of the command is on the page."""
    codes = section("Signals and exit codes")
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", codes, re.MULTILINE)}
    command = {terminal.OK, terminal.FAILED, terminal.USAGE, terminal.UNREACHABLE}
    assert told == command | {terminal.INTERRUPTED, 78}


def test_the_page_names_the_metadata_of_calls() -> None:
    """Each metadata key of the wire is on the page."""
    keys = {
        value
        for name, value in vars(call).items()
        if name.isupper() and isinstance(value, str) and value.startswith("tollgate-")
    }
    assert len(keys) > 8, "the search finds nothing"
    assert {key for key in keys if f"`{key}`" not in PAGE} == set()
