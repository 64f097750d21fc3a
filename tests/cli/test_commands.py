"""The commands, as people and programs run them, against a real mesh."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cli.demo.demo import QUESTIONS, SAMPLES
from cli.demo.write_handbook import HANDBOOK
from cli.main import app
from cli.supervisor import ROOMS
from tests.running import Up, tollgate, wait_until

pytestmark = pytest.mark.timeout(180)


NOWHERE = {f"TOLLGATE_{room.upper()}_ADDRESS": "127.0.0.1:1" for room in ROOMS}


def asked(running: Up, *arguments: str) -> Any:
    """What a command answers to programs; it must end well and say nothing else."""
    done = tollgate(*arguments, "--json", environment=running.environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    return json.loads(done.stdout)


def read(running: Up, *arguments: str) -> str:
    """What a command says to people; it must end well."""
    done = tollgate(*arguments, environment=running.environment)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert not done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def added(running: Up) -> dict[str, Any]:
    """The samples in the mesh, as `add` reports them."""
    report: dict[str, Any] = asked(running, "add", str(SAMPLES))
    return report


def _document(added: dict[str, Any], file_name: str) -> dict[str, Any]:
    (found,) = [d for d in added["documents"] if d["file"].endswith(file_name)]
    document: dict[str, Any] = found["document"]
    return document


def test_the_samples_become_searchable(added: dict[str, Any]) -> None:
    """A PDF of six pages, a Markdown and an HTML file are all ready when `add` ends."""
    assert (added["ready"], added["failed"], added["deferred"]) == (3, 0, 0)
    assert _document(added, ".pdf")["progress"]["pages_total"] == 6


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda q: q.file_name)
def test_a_search_finds_the_right_page_by_meaning(
    running: Up, added: dict[str, Any], question: Any
) -> None:
    """The best hit is the known passage, though no telling word of the question is in it."""
    hit = asked(running, "search", question.text)["hits"][0]
    assert (hit["file_name"], hit["page"]) == (question.file_name, question.page)
    assert not hit["provenance"]["simulated"]
    assert question.file_name in read(running, "search", question.text)


def test_adding_the_same_files_again_changes_nothing(running: Up, added: dict[str, Any]) -> None:
    """The ids are the files', so nothing is there twice and no revision is made."""
    again = asked(running, "add", str(SAMPLES))
    assert again["ready"] == 3
    before = {d["document_id"]: d["document"]["revision"] for d in added["documents"]}
    assert {d["document_id"]: d["document"]["revision"] for d in again["documents"]} == before


def test_documents_are_listed_and_shown(running: Up, added: dict[str, Any]) -> None:
    """The list has them all; one is shown with its request id; states can be asked for."""
    document = _document(added, ".pdf")
    listed = asked(running, "documents", "--state", "ready")["documents"]
    assert document["id"] in {d["id"] for d in listed}
    assert document["request_id"] in read(running, "documents", document["id"])
    assert document["id"] in read(running, "documents")


def test_holds_of_a_document_are_settled_and_name_every_step(
    running: Up, added: dict[str, Any]
) -> None:
    """The ledger says what parsing, embedding and storing held and were charged."""
    request_id = _document(added, ".pdf")["request_id"]

    def settled() -> Any:
        holds = asked(running, "holds", "--request-id", request_id)["holds"]
        return holds if all(h["state"] != "HOLD_STATE_HELD" for h in holds) else None

    assert wait_until(settled, 30)
    holds = settled()
    assert {"parser", "embedder", "storage"} <= {h["scope"]["service"] for h in holds}
    assert "settled" in read(running, "holds", "--request-id", request_id)


def test_the_trace_of_a_document_has_every_daemon_with_parents_right(
    running: Up, added: dict[str, Any]
) -> None:
    """One trace holds spans of all six rooms, and every span but the first has its parent in it."""
    request_id = _document(added, ".pdf")["request_id"]
    rooms = {"router", "cost", "parser", "embedder", "storage", "corpus"}

    def whole() -> Any:
        spans = asked(running, "trace", request_id)
        return spans if {s["service"] for s in spans} >= rooms else None

    assert wait_until(whole, 20)
    spans = whole()
    assert len({s["trace_id"] for s in spans}) == 1
    ids = {s["span_id"] for s in spans}
    assert [s["service"] for s in spans if s["parent_id"] not in ids] == ["router"]
    drawn = read(running, "trace", request_id)
    assert all(room in drawn for room in rooms)


def test_usage_names_what_was_done(running: Up, added: dict[str, Any]) -> None:
    """The report of the day has the parser's pages and the embedder's tokens."""

    def rows() -> Any:
        found = {
            r["scope"]["service"]: r
            for r in asked(running, "usage", "--by", "service")["rows"]
            if not r["scope"]["simulated"]
        }
        return found if {"parser", "embedder"} <= set(found) else None

    assert wait_until(rows, 30)
    assert int(rows()["parser"]["usage"]["pages"]) >= 6
    assert int(rows()["embedder"]["usage"]["tokens"]) > 100
    assert "total" in read(running, "usage", "--bucket", "hour", "--since", "24h")


def test_a_limit_is_added_shown_changed_and_deleted(running: Up) -> None:
    """Amounts in USD become nano-dollars exactly, and the list shows consumption."""
    made = asked(
        running, "limits", "add", "acme-day", "--max-usd", "20.5", "--for", "tenant=acme",
        "--alert", "80",
    )["limit"]  # fmt: skip
    assert (made["maximum"], made["window"]) == ("20500000000", "WINDOW_DAY")
    assert made["scope"]["tenant"] == {"match": "MATCH_EXACT", "value": "acme"}
    changed = asked(running, "limits", "set", "acme-day", "--max-usd", "0.000000001")["limit"]
    assert changed["maximum"] == "1"
    assert changed["enforcement"] == "ENFORCEMENT_HARD"
    assert "acme-day" in read(running, "limits")
    assert "tenant=acme" in read(running, "limits", "show", "acme-day")
    asked(running, "limits", "delete", "acme-day")
    gone = tollgate("limits", "show", "acme-day", environment=running.environment)
    assert gone.returncode == 1
    assert gone.stderr == "NOT_FOUND: there is no limit acme-day\n"


def test_a_fresh_mesh_has_ten_dollars_a_day_and_five_an_hour(running: Up) -> None:
    """The default limits of every tenant are there."""
    limits = asked(running, "limits")["limits"]
    cost = {(m["window"], m["maximum"]) for m in limits if m["metric"] == "METRIC_COST"}
    assert {("WINDOW_DAY", "10000000000"), ("WINDOW_HOUR", "5000000000")} <= cost


@pytest.mark.parametrize(
    "arguments",
    [
        ("limits", "add", "x"),
        ("limits", "add", "x", "--max-usd", "ten"),
        ("limits", "add", "x", "--metric", "tokens", "--max-usd", "1"),
        ("limits", "add", "x", "--max-usd", "1", "--for", "planet=mars"),
        ("limits", "add", "x", "--max-usd", "1", "--window", "fortnight"),
        ("add", "/nowhere/at/all.pdf"),
        ("usage", "--since", "yesterday"),
        ("search",),
        ("search", "x", "--filter", "foo"),
        ("search", "x", "--filter", "=foo"),
        ("mode", "maybe"),
        ("health", "--router", "nonsense"),
        ("health", "--router", "http://127.0.0.1:50050"),
        ("search", "x", "--tenant", "ü"),
        ("search", "x", "--tenant", "a\nb"),
        ("search", "x", "--api-key", "tg_ü"),
        ("search", "\udcff"),
        ("limits", "--tenant", ""),
        ("limits", "create", "x"),
        ("keys", "add", "x", "--tenant", ""),
        ("keys", "add", "ü"),
        ("frobnicate",),
    ],
)
def test_a_wrong_use_is_told_with_exit_code_two(arguments: tuple[str, ...]) -> None:
    """What the command cannot mean is refused before anything is asked of a mesh."""
    done = CliRunner().invoke(app, arguments, env=NOWHERE)
    assert done.exit_code == 2, done.output
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("search", "x"),
        ("documents",),
        ("add", str(SAMPLES)),
        ("limits",),
        ("prices",),
        ("usage",),
        ("holds",),
        ("backends",),
        ("mode",),
        ("health",),
    ],
)
def test_a_mesh_that_is_not_there_is_exit_code_three(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Every command says in one line where nobody answers, and what to do."""
    environment = NOWHERE | {"TOLLGATE_STATE_DIR": str(tmp_path)}
    done = CliRunner().invoke(app, arguments, env=environment)
    assert done.exit_code == 3, done.output
    assert "tollgate up" in done.stderr
    assert "Traceback" not in done.stderr
    told = CliRunner().invoke(app, [*arguments, "--json"], env=environment)
    assert told.exit_code == 3
    assert json.loads(told.stderr)["error"]["reason"] == "UNREACHABLE"


def test_a_document_that_cannot_be_read_is_named_with_why(running: Up, tmp_path: Path) -> None:
    """`add` goes on with the others, names the bad one, its reason, and exits with 1."""
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.4\nthis is no PDF")
    (tmp_path / "empty.md").write_bytes(b"")
    (tmp_path / "good.md").write_text("# Tides\n\nThe sea comes in twice a day.\n")
    done = tollgate("add", str(tmp_path), "--json", environment=running.environment)
    assert done.returncode == 1, done.stderr
    report = json.loads(done.stdout)
    states = {Path(d["file"]).name: (d["state"], d["reason"]) for d in report["documents"]}
    assert states["good.md"] == ("ready", "")
    assert states["broken.pdf"] == ("failed", "DOCUMENT_UNREADABLE")
    assert states["empty.md"][0] == "failed"
    assert states["empty.md"][1] in {"DOCUMENT_UNREADABLE", "INVALID_FIELD"}


def test_a_large_document_goes_through_the_object_store(running: Up, tmp_path: Path) -> None:
    """More than 4 MiB are uploaded in parts, become searchable, and go with the document."""
    big = tmp_path / "big.pdf"
    # The handbook with a comment of 5 MiB before its end: large, and no work to embed.
    body, end = HANDBOOK.read_bytes().split(b"startxref", 1)
    big.write_bytes(body + b"%" + b"x" * (5 << 20) + b"\nstartxref" + end)
    report = asked(running, "add", str(big), "--collection", "large")
    (document,) = report["documents"]
    assert document["state"] == "ready"
    assert document["document"]["size_bytes"] == str(big.stat().st_size)
    gone = asked(running, "documents", "delete", document["document_id"], "--collection", "large")
    assert int(gone["chunks"]) >= 1


def test_ctrl_c_leaves_the_work_going_on(running: Up, tmp_path: Path) -> None:
    """Interrupted while it watches, `add` says so, exits with 130, and the document gets ready."""
    for number in range(8):  # seconds of work, however fast the machine
        words = "\n\n".join(f"## Part {number}.{n}\n\nIt rained {n} days." for n in range(600))
        (tmp_path / f"rain{number}.md").write_text(words)
    process = subprocess.Popen(
        [sys.executable, "-m", "cli.main", "add", str(tmp_path), "--collection", "rain"],
        env=running.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def documents() -> list[Any]:
        found: list[Any] = asked(running, "documents", "--collection", "rain")["documents"]
        return found

    assert process.stdout is not None
    # Until one is in the mesh: asking the mesh itself would take too long.
    assert next((line for line in process.stdout if not line.endswith("storing\n")), None)
    process.send_signal(signal.SIGINT)
    said, complained = process.communicate(timeout=30)
    assert process.returncode == 130, (said, complained)
    assert "the mesh goes on with" in said
    assert wait_until(
        lambda: all(d["state"] == "DOCUMENT_STATE_READY" for d in documents()), 150
    ), documents()


def test_backends_are_listed_with_their_health(running: Up) -> None:
    """The genuine and the mock backend of each service serve."""
    found = {(b["service"], b["provider"]): b for b in asked(running, "backends")["backends"]}
    for name in (("parser", "local"), ("embedder", "minilm"), ("embedder", "mock")):
        assert found[name]["health"] == "BACKEND_HEALTH_SERVING"
    assert "minilm" in read(running, "backends", "--service", "embedder")


def test_the_mode_is_shown_switched_and_switched_back(running: Up) -> None:
    """`mode mock --service embedder` changes that service alone."""

    def modes() -> dict[str, str]:
        return {m["service"]: m["mode"] for m in asked(running, "mode")["modes"]}

    before = modes()
    asked(running, "mode", "mock", "--service", "embedder")
    try:
        assert modes() == before | {"embedder": "MODE_MOCK"}
    finally:
        asked(running, "mode", before["embedder"].removeprefix("MODE_").lower())
    assert modes()["embedder"] == before["embedder"]


def test_simulated_work_is_marked_everywhere_and_is_no_spend(
    running: Up, added: dict[str, Any], tmp_path: Path
) -> None:
    """What mocks made says so in `add` and `documents`, and no total of `usage` has it."""

    def spent() -> Any:
        return asked(running, "usage", "--by", "service")

    (tmp_path / "tides.md").write_text("# Tides\n\nThe sea comes in twice a day.\n")
    before = {m["service"]: m["mode"] for m in asked(running, "mode")["modes"]}
    genuine = spent()["total"]
    asked(running, "mode", "mock")
    try:
        said = read(running, "add", str(tmp_path), "--collection", "mocked")
    finally:
        asked(running, "mode", before["embedder"].removeprefix("MODE_").lower())
    assert "tides.md: ready (simulated): " in said
    assert "1 ready, 1 of them simulated" in said
    listed = read(running, "documents", "--collection", "mocked")
    assert "ready (simulated)" in listed
    assert wait_until(lambda: int(spent()["simulated"]["charged_nanos_usd"]) > 0, 30)
    assert spent()["total"] == genuine
    for row in spent()["rows"]:
        assert row["scope"]["simulated"] or row["charged_nanos_usd"] == "0"
    table = read(running, "usage")
    assert "simulated" in table
    assert "never counted as spend" in table


def test_namesakes_and_files_that_cannot_be_read_are_told_apart_by_name(
    running: Up, tmp_path: Path
) -> None:
    """`add` off a terminal names each stage, two files of one name, and a pipe with why."""
    for folder in ("old", "new"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "r.md").write_text(f"# Boats\n\nThe {folder} boat floats.\n")
    os.mkfifo(tmp_path / "pipe")
    arguments = ("add", str(tmp_path), "--collection", "apart")
    done = tollgate(*arguments, environment=running.environment)
    assert done.returncode == 1
    for words in ("old/r.md: storing", "new/r.md: ready: 1 page", "pipe: failed: FILE_UNREADABLE"):
        assert words in done.stdout
    hits = asked(running, "search", "boats", "--collection", "apart")["hits"]
    assert {hit["file_name"] for hit in hits} == {"old/r.md", "new/r.md"}


def test_health_asks_every_daemon(running: Up) -> None:
    """All rooms, their services and providers answer for themselves, the router for its own."""
    found = asked(running, "health")
    assert {line["daemon"] for line in found} == {
        "cost", "storage", "parser", "embedder", "router", "corpus",
    }  # fmt: skip
    assert {line["status"] for line in found} == {"SERVING"}
    assert "minilm" in {line["provider"] for line in found}
    assert {line["service"] for line in found if line["daemon"] == "router"} == {
        "",
        "tollgate.router.v1.RouterService",
        "tollgate.parser.v1.ParserService",
        "tollgate.embedder.v1.EmbedderService",
        "tollgate.storage.v1.ObjectService",
        "tollgate.storage.v1.VectorService",
        "tollgate.corpus.v1.CorpusService",
    }


def test_prices_are_listed(running: Up) -> None:
    """Every price has a provider, a unit and an amount; local work is free explicitly."""
    prices = asked(running, "prices")["prices"]
    assert any(
        p["provider"] == "minilm" and p["unit_price"]["nanos_usd_per_million"] == "0"
        for p in prices
    )
    assert "free" in read(running, "prices")


def test_the_token_opens_a_daemon_behind_the_router(running: Up) -> None:
    """What `token` prints is one header that the ledger accepts; without it, it refuses."""
    header = read(running, "token").strip()
    assert header.startswith("tollgate-identity: ")
    assert "\n" not in header
    buf = Path(sys.executable).with_name("buf")
    url = f"http://{running.environment['TOLLGATE_COST_ADDRESS']}"
    line = [str(buf), "curl", "--protocol", "grpc", "--http2-prior-knowledge"]
    method = f"{url}/tollgate.cost.v1.LimitService/ListLimits"
    opened = subprocess.run(
        [*line, "-H", header, method], capture_output=True, text=True, check=False
    )
    assert opened.returncode == 0, opened.stderr
    refused = subprocess.run([*line, method], capture_output=True, text=True, check=False)
    assert refused.returncode != 0
    assert "unauthenticated" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "address", "what"),
    [
        (("search", "x", "--router"), "COST", "router"),
        (("limits", "--cost"), "ROUTER", "cost daemon"),
        (("usage", "--cost"), "PARSER", "cost daemon"),
    ],
)
def test_an_address_of_another_daemon_is_said_to_be_one(
    running: Up, arguments: tuple[str, ...], address: str, what: str
) -> None:
    """The wrong daemon's address is named as such in one line, with exit code 3."""
    there = running.environment[f"TOLLGATE_{address}_ADDRESS"]
    done = tollgate(*arguments, there, environment=running.environment)
    assert done.returncode == 3, done.stderr
    assert f"{there} is not a {what}" in done.stderr


def test_a_key_may_have_the_newline_of_its_file(running: Up) -> None:
    """White space around TOLLGATE_API_KEY is no part of it."""
    environment = running.environment | {"TOLLGATE_API_KEY": " tg_x\n"}
    assert tollgate("documents", environment=environment).returncode == 0


def test_a_usage_error_of_a_group_shows_the_usage_of_the_group() -> None:
    """`limits create` is no word for `limits list`, and the line says which words there are."""
    done = CliRunner().invoke(app, ["limits", "create", "x"], env=NOWHERE)
    assert "No such command 'create'" in done.stderr
    assert "limits list" not in done.stderr


def test_keys_are_made_listed_and_taken_away(tmp_path: Path) -> None:
    """A key is shown once, listed without its secret, and gone after its revocation."""
    environment = dict(os.environ) | {"TOLLGATE_STATE_DIR": str(tmp_path)}
    arguments = ("keys", "add", "ci", "--tenant", "acme", "--operator", "--json")
    made = json.loads(tollgate(*arguments, environment=environment).stdout)
    assert made["key"].startswith(f"tg_{made['id']}_")
    alone = tollgate("keys", "add", "me", environment=environment).stdout
    assert alone.split() == [alone.strip()]
    tollgate("keys", "revoke", alone.split("_")[1], environment=environment)
    listed = tollgate("keys", "--json", environment=environment).stdout
    assert made["key"] not in listed
    assert [(k["tenant"], k["operator"]) for k in json.loads(listed)] == [("acme", True)]
    assert tollgate("keys", "revoke", made["id"], environment=environment).returncode == 0
    assert json.loads(tollgate("keys", "--json", environment=environment).stdout) == []
    assert tollgate("keys", "revoke", "nobody", environment=environment).returncode == 1


def test_an_unknown_document_is_one_line_with_its_reason(running: Up) -> None:
    """An error of the mesh has its reason, in one line, and as JSON for programs."""
    done = tollgate("documents", "no-such-document", environment=running.environment)
    assert done.returncode == 1
    assert done.stderr.startswith("NOT_FOUND: ")
    assert len(done.stderr.strip().splitlines()) == 1
    told = tollgate("documents", "no-such-document", "--json", environment=running.environment)
    assert json.loads(told.stderr)["error"]["reason"] == "NOT_FOUND"
    assert not told.stdout


def test_another_tenant_sees_nothing(running: Up, added: dict[str, Any]) -> None:
    """--tenant speaks for that tenant, who has no documents and finds none."""
    assert asked(running, "documents", "--tenant", "stranger")["documents"] == []
    assert asked(running, "search", "wind", "--tenant", "stranger")["hits"] == []


def test_every_command_explains_itself() -> None:
    """--help of every command ends well and mentions --json."""
    commands: list[tuple[str, ...]] = [
        ("up",), ("demo",), ("add",), ("search",), ("documents", "show"), ("documents", "delete"),
        ("prices",), ("usage",), ("holds",), ("limits", "list"), ("limits", "add"),
        ("limits", "set"), ("limits", "delete"), ("backends",), ("mode",), ("health",),
        ("trace",), ("token",), ("keys", "list"), ("keys", "add"), ("keys", "revoke"),
    ]  # fmt: skip
    for command in commands:
        done = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "120"})
        assert done.exit_code == 0, command
        assert "--json" in done.stdout, command
