"""The gate around its calls: modes that last, health, keys, and a ledger that is away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import asyncpg
import pytest
from pydantic import SecretStr, ValidationError
from tollgate.cost.v1 import cost_pb2
from tollgate.embedder.v1 import embedder_pb2
from tollgate.router.v1 import router_pb2

from chassis.call import CALL_ID
from chassis.errors import (
    Forbidden,
    InvalidField,
    LedgerUnavailable,
    NoBackend,
    Overloaded,
    PriceUnknown,
    ProviderUnavailable,
    TollgateError,
    Unauthenticated,
)
from chassis.keys import KeyFile
from chassis.settings import MeshSettings, SettingsError, load
from services.cost import main as cost
from services.router import main as router
from services.router.core.routes import Mode
from services.router.store import MIGRATIONS
from tests.router.conftest import started
from tests.router.router_standing import (
    Answered,
    Context,
    Standing,
    answered,
    stand_in,
    well,
)

EMBEDDER = "tollgate.embedder.v1.EmbedderService"


async def _set_mode(
    standing: Standing,
    service: str,
    mode: router_pb2.Mode.ValueType,
    metadata: Sequence[tuple[str, str]] = (),
) -> Answered:
    request = router_pb2.SetModeRequest(service=service, mode=mode)
    return await answered(standing.router.SetMode(request, metadata=tuple(metadata)))


def _modes(found: Answered) -> dict[str, router_pb2.ServiceMode]:
    return {mode.service: mode for mode in found.answer.modes}


async def test_a_switched_mode_is_kept_and_shared(mesh: MeshSettings) -> None:
    """A switch says when and by whom, holds for the next call, for other routers and after."""
    async with started(mesh) as one:
        before = _modes(await answered(one.router.GetMode(router_pb2.GetModeRequest())))
        assert before["embedder"].mode == router_pb2.MODE_REAL
        assert not before["embedder"].HasField("set_time")
        switched = _modes(await _set_mode(one, "embedder", router_pb2.MODE_MOCK))
        assert switched["embedder"].mode == router_pb2.MODE_MOCK
        assert switched["embedder"].HasField("set_time")
        assert switched["embedder"].set_by == "default"
        assert switched["parser"].mode == router_pb2.MODE_REAL
        assert (await one.embed()).provenance.provider == "mock"
        async with started(mesh) as other:
            assert (await other.embed()).provenance.provider == "mock"
            await _set_mode(one, "", router_pb2.MODE_REAL)
            for _ in range(100):
                if (await other.embed()).provenance.provider == "fickle":
                    break
                await asyncio.sleep(0.05)
            else:
                raise AssertionError("the other router did not hear of it")


@pytest.mark.parametrize(
    ("service", "mode"),
    [
        ("nobody", router_pb2.MODE_MOCK),
        ("corpus", router_pb2.MODE_MOCK),
        ("embedder", router_pb2.MODE_UNSPECIFIED),
        ("embedder", 99),
    ],
)
async def test_a_switch_must_name_a_service_and_a_mode(
    standing: Standing, service: str, mode: router_pb2.Mode.ValueType
) -> None:
    """An unknown service or mode is INVALID_FIELD, and nothing is switched."""
    assert isinstance((await _set_mode(standing, service, mode)).error, InvalidField)
    assert (await standing.embed()).provenance.provider == "fickle"


async def test_keys_open_the_gate(mesh: MeshSettings, tmp_path: Path) -> None:
    """With keys, a call needs one; it spends as the key's tenant; only operators switch modes."""
    keys = KeyFile(tmp_path / "keys.jsonl")
    _, plain = keys.add("plain", tenant="acme")
    _, chief = keys.add("chief", tenant="acme", operator=True)
    async with started(mesh, authentication="keys", keys_file=keys.path) as standing:
        assert isinstance((await standing.embed()).error, Unauthenticated)
        bearer = [("authorization", f"Bearer {plain}")]
        assert (await standing.embed(metadata=bearer)).answer
        (hold,) = await standing.settled("SETTLED")
        assert hold.scope.tenant == "acme"
        refused = await _set_mode(standing, "", router_pb2.MODE_MOCK, bearer)
        assert isinstance(refused.error, Forbidden)
        operator = [("authorization", f"Bearer {chief}")]
        assert (await _set_mode(standing, "", router_pb2.MODE_MOCK, operator)).answer


def test_without_keys_only_this_machine_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """A router that trusts tenants at their word refuses to listen beyond loopback, clearly."""
    for name, value in {
        "TOLLGATE_ROUTER_LISTEN": "0.0.0.0:50050",
        "TOLLGATE_ROUTER_AUTHENTICATION": "none",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=r"TOLLGATE_ROUTER_AUTHENTICATION: .*loopback"):
        load(MeshSettings, router.Settings)
    monkeypatch.delenv("TOLLGATE_ROUTER_AUTHENTICATION")
    with pytest.raises(SettingsError, match="TOLLGATE_ROUTER_AUTHENTICATION"):
        load(MeshSettings, router.Settings)
    monkeypatch.setenv("TOLLGATE_ROUTER_AUTHENTICATION", "keys")
    assert load(MeshSettings, router.Settings)


def test_backends_can_be_set(mesh_without_database: MeshSettings) -> None:
    """The backends are those of the daemons' addresses, or those that the setting lists."""
    services = {route.grpc_service for route in router.default_routes(mesh_without_database)}
    assert len(services) == 5
    listed = [{"service": EMBEDDER, "provider": "p", "kind": "REAL", "address": "host:1"}]
    backends = router.Settings.model_validate({"backends": listed}).backends
    assert backends is not None
    assert backends[0].route().service == "embedder"
    for fault in ({"service": "x.Y"}, {"kind": "FAKE"}, {"address": "nowhere"}, {"provider": ""}):
        with pytest.raises(ValidationError):
            router.Settings.model_validate({"backends": [listed[0] | fault]})


def test_backends_that_are_no_json_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A spoilt list, in the environment or in a file, is a fault by name and without its text."""
    spoilt = tmp_path / "backends.json"
    spoilt.write_text("[a secret")
    for name, value in (("", "[a secret"), ("_FILE", str(spoilt))):
        with monkeypatch.context() as environment:
            environment.setenv(f"TOLLGATE_ROUTER_BACKENDS{name}", value)
            with pytest.raises(SettingsError, match="TOLLGATE_ROUTER_BACKENDS") as fault:
                load(MeshSettings, router.Settings)
            assert "secret" not in str(fault.value)


def test_each_service_may_have_a_mode_of_its_own() -> None:
    """The mode of the settings is for all services but those that have their own."""
    found = router.Settings.model_validate({"mode": "MOCK", "parser_mode": "HYBRID"}).modes()
    assert found == {"parser": Mode.HYBRID, "embedder": Mode.MOCK, "storage": Mode.MOCK}


async def test_without_the_ledger_nothing_passes(mesh: MeshSettings) -> None:
    """With the ledger away a call is LEDGER_UNAVAILABLE and unsent; when it is back, calls pass."""
    settings = cost.Settings(listen="127.0.0.1:0")
    async with stand_in(mesh) as (fickle, address):
        async with cost.wire(mesh, settings) as ledger:
            mesh = mesh.model_copy(update={"cost_address": ledger.address})
        backend = {"service": EMBEDDER, "provider": "fickle", "kind": "REAL", "address": address}
        own = router.Settings.model_validate({"listen": "127.0.0.1:0", "backends": [backend]})
        async with router.wire(mesh, own) as gate:
            standing = Standing(mesh, gate.address, fickle)
            await standing.ready()
            refused = await standing.embed(metadata=[(CALL_ID, "patient")])
            assert isinstance(refused.error, LedgerUnavailable)
            assert refused.error.retry_after_s
            assert fickle.asked == []
            async with cost.wire(mesh, cost.Settings(listen=ledger.address)):
                await standing.price("fickle", 1)
                assert (await _until_passed(standing)).answer
                await standing.settled("SETTLED")
            await standing.close()


async def _until_passed(standing: Standing) -> Answered:
    for _ in range(100):
        found = await standing.embed(metadata=[(CALL_ID, "patient")])
        if not isinstance(found.error, LedgerUnavailable):
            return found
        await asyncio.sleep(0.1)
    raise AssertionError("the ledger is not seen")


async def test_a_dead_backend_is_noticed_and_so_is_its_return(mesh: MeshSettings) -> None:
    """While a backend is away calls are UNAVAILABLE and not billed; it serves when it is back."""
    async with cost.wire(mesh, cost.Settings(listen="127.0.0.1:0")) as ledger:
        mesh = mesh.model_copy(update={"cost_address": ledger.address})
        async with stand_in(mesh) as (fickle, address):
            own = router.Settings.model_validate(
                {
                    "listen": "127.0.0.1:0",
                    "backends": [
                        {
                            "service": EMBEDDER,
                            "provider": "fickle",
                            "kind": "REAL",
                            "address": address,
                        }
                    ],
                }
            )
            gate_context = router.wire(mesh, own)
            gate = await gate_context.__aenter__()
            standing = Standing(mesh, gate.address, fickle)
            await standing.ready()
            await standing.price("fickle", 1_000_000)
            assert (await standing.embed()).answer
        try:
            down = [(await standing.embed()).error for _ in range(3)]
            assert all(isinstance(error, NoBackend | ProviderUnavailable) for error in down)
            assert all(hold.state in (2, 3) for hold in await _resolved(standing))
            async with stand_in(mesh, address) as (again, _):
                await _until_serving(standing)
                assert (await standing.embed()).answer
                assert again.asked
        finally:
            await standing.close()
            await gate_context.__aexit__(None, None, None)


async def _resolved(standing: Standing) -> list[cost_pb2.Hold]:
    for _ in range(100):
        holds = await standing.holds()
        if all(hold.state != 1 for hold in holds):
            return holds
        await asyncio.sleep(0.05)
    raise AssertionError("a hold is open")


async def _until_serving(standing: Standing) -> None:
    for _ in range(200):
        found = await standing.embed()
        if found.error is None:
            return
        assert isinstance(found.error, TollgateError)
        assert found.error.code == "UNAVAILABLE"
        await asyncio.sleep(0.1)
    raise AssertionError("the backend is not seen")


async def test_a_call_without_a_price_is_refused(mesh: MeshSettings) -> None:
    """PRICE_UNKNOWN says for what a price must be set; nothing is sent."""
    async with started(mesh, priced=False) as standing:
        found = await standing.embed()
        assert isinstance(found.error, PriceUnknown)
        (violation,) = found.error.violations
        assert violation.subject == "price"
        assert "fickle" in violation.description
        assert standing.fickle.asked == []


async def test_the_backends_are_listed_with_how_they_fare(standing: Standing) -> None:
    """ListBackends has kind, health, calls, failures and latency, for one service or for all."""
    standing.fickle.behaviour = well
    await standing.embed()
    listed = await standing.router.ListBackends(router_pb2.ListBackendsRequest(service="embedder"))
    genuine, mock = listed.backends
    assert (genuine.provider, genuine.kind) == ("fickle", router_pb2.BACKEND_KIND_REAL)
    assert (genuine.calls, genuine.failures, genuine.in_flight) == (1, 0, 0)
    assert genuine.latency_ms > 0
    assert genuine.health == router_pb2.BACKEND_HEALTH_SERVING
    assert (mock.provider, mock.kind, mock.calls) == ("mock", router_pb2.BACKEND_KIND_MOCK, 0)
    none = await standing.router.ListBackends(router_pb2.ListBackendsRequest(service="parser"))
    assert list(none.backends) == []


async def test_a_router_serves_without_its_database(mesh: MeshSettings) -> None:
    """While the modes cannot be read those of the settings hold, and a switch is refused."""
    async with started(mesh) as standing:
        away = standing.mesh.model_copy(
            update={"database_url": SecretStr("postgresql://nobody@127.0.0.1:1/nothing")}
        )
        listed = await standing.router.ListBackends(router_pb2.ListBackendsRequest())
        backends = [
            {
                "service": EMBEDDER,
                "provider": backend.provider,
                "kind": router_pb2.BackendKind.Name(backend.kind).removeprefix("BACKEND_KIND_"),
                "address": backend.address,
            }
            for backend in listed.backends
        ]
        own = router.Settings.model_validate(
            {"listen": "127.0.0.1:0", "backends": backends, "mode": "MOCK"}
        )
        async with router.wire(away, own) as gate:
            blind = Standing(away, gate.address, standing.fickle)
            await blind.ready()
            assert (await blind.embed()).provenance.provider == "mock"
            refused = await _set_mode(blind, "embedder", router_pb2.MODE_REAL)
            assert isinstance(refused.error, ProviderUnavailable)
            await blind.close()


async def test_too_many_calls_are_refused_before_anything_is_held(mesh: MeshSettings) -> None:
    """With as many calls under way as there may be, the next is OVERLOADED, with no hold."""
    async with started(mesh) as standing:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def slow(
            request: embedder_pb2.EmbedRequest, context: Context
        ) -> embedder_pb2.EmbedResponse:
            begun.set()
            await go_on.wait()
            return await well(request, context)

        standing.fickle.behaviour = slow
        small = standing.mesh.model_copy(update={"calls_max": 1})
        listed = await standing.router.ListBackends(router_pb2.ListBackendsRequest())
        backend = {
            "service": EMBEDDER,
            "provider": "fickle",
            "kind": "REAL",
            "address": listed.backends[0].address,
        }
        own = router.Settings.model_validate({"listen": "127.0.0.1:0", "backends": [backend]})
        async with router.wire(small, own) as gate:
            narrow = Standing(small, gate.address, standing.fickle)
            await narrow.ready()
            first = asyncio.create_task(narrow.embed())
            await begun.wait()
            assert isinstance((await narrow.embed()).error, Overloaded)
            go_on.set()
            assert (await first).answer
            await standing.settled("SETTLED")
            await narrow.close()


async def test_the_router_s_role_may_only_add_and_read(mesh: MeshSettings) -> None:
    """The router works as a role that cannot rewrite the history of modes."""
    async with started(mesh):
        assert mesh.database_url is not None
        connection = await asyncpg.connect(mesh.database_url.get_secret_value())
        try:
            await connection.execute("SET ROLE tollgate_router")
            for statement in (
                "UPDATE router.mode_changes SET mode = 'REAL'",
                "DELETE FROM router.mode_changes",
            ):
                with pytest.raises(asyncpg.InsufficientPrivilegeError):
                    await connection.execute(statement)
        finally:
            await connection.close()
    assert sorted(path.name for path in MIGRATIONS.iterdir())[0] == "0001_modes.sql"
