"""The router daemon: `python -m services.router.main`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from tollgate.router.v1 import answer_pb2, router_pb2, router_pb2_grpc

from chassis import call as calls
from chassis import telemetry
from chassis.keys import KeyFile, default_path
from chassis.server import Daemon, launch
from chassis.settings import Address, MeshSettings, RoomSettings, room_config
from chassis.tasks import finish
from services.router.authenticate import (
    Authentication,
    Metadata,
    authenticator,
    is_loopback,
    request_id_of,
)
from services.router.clients import BackendPeers, LedgerPeer
from services.router.core.routes import MODAL_SERVICES, Backend, Health, Kind, Mode, Route
from services.router.modes import StandingModes
from services.router.service.gate import Gate, Rules, handlers
from services.router.service.meters import FRONTED, metered
from services.router.service.operators import RouterService

SERVICE = router_pb2.DESCRIPTOR.services_by_name["RouterService"].full_name
_ROOM_OF = {service.full_name: room for service, room in FRONTED.items()}
_EMBEDDER = "tollgate.embedder.v1.EmbedderService"


class BackendSetting(BaseModel):
    """One backend, as TOLLGATE_ROUTER_BACKENDS lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    service: str = Field(description="The full name of the gRPC service.")
    provider: str = Field(min_length=1, max_length=128)
    kind: Kind
    address: Address
    priority: int = 0

    @field_validator("service")
    @classmethod
    def _fronted(cls, value: str) -> str:
        if value not in _ROOM_OF:
            raise ValueError(f"must be one of {', '.join(_ROOM_OF)}")
        return value

    def route(self) -> Route:
        """The same, as the core knows it."""
        return Route(
            service=_ROOM_OF[self.service],
            grpc_service=self.service,
            provider=self.provider,
            kind=self.kind,
            address=self.address,
            priority=self.priority,
        )


class Settings(RoomSettings):
    """Settings of the router, under TOLLGATE_ROUTER_."""

    model_config = room_config("router")

    listen: Address = Field("127.0.0.1:50050", description="Where the router listens.")
    authentication: Authentication = Field(
        Authentication.NONE,
        validate_default=True,
        description="How callers say who they are: `keys`, or `none` on a loopback address only.",
    )
    keys_file: Path | None = Field(
        None, description="The file of API keys; `keys.jsonl` in the state directory when unset."
    )
    callers_may_choose: bool = Field(
        False, description="Whether every caller may choose any mode and provider, not only MOCK."
    )
    mode: Mode = Field(Mode.REAL, description="The mode of services until it is switched.")
    parser_mode: Mode | None = Field(None, description="The same for the parser alone.")
    embedder_mode: Mode | None = Field(None, description="The same for the embedder alone.")
    storage_mode: Mode | None = Field(None, description="The same for storage alone.")
    backends: list[BackendSetting] | None = Field(
        None, description="The backends as JSON; those of the daemons' addresses when unset."
    )
    attempts_max: int = Field(
        3, ge=1, le=16, description="Backends that a call is tried on, each with a hold of its own."
    )
    waiting_max: int = Field(
        2_048, ge=1, description="Calls that may wait for the ledger; more are OVERLOADED."
    )
    settle_for_s: float = Field(
        60.0, gt=0, le=3_600, description="How long settling is tried again; the hold expires then."
    )

    @field_validator("authentication")
    @classmethod
    def _trusted_on_loopback_only(
        cls, value: Authentication, info: ValidationInfo
    ) -> Authentication:
        if value is Authentication.NONE and not is_loopback(info.data.get("listen", "")):
            raise ValueError(
                "must be `keys` where TOLLGATE_ROUTER_LISTEN is not a loopback address"
            )
        return value

    def modes(self) -> dict[str, Mode]:
        """The mode of each service until it is switched."""
        return {
            service: getattr(self, f"{service}_mode") or self.mode for service in MODAL_SERVICES
        }


def default_routes(mesh: MeshSettings) -> list[Route]:
    """The backends of a mesh whose daemons are where its settings say."""
    real, mock = Kind.REAL, Kind.MOCK
    listed: list[tuple[str, str, Kind, str]] = [
        ("tollgate.parser.v1.ParserService", "local", real, mesh.parser_address),
        ("tollgate.parser.v1.ParserService", "mock", mock, mesh.parser_address),
        (_EMBEDDER, "minilm", real, mesh.embedder_address),
        (_EMBEDDER, "mock", mock, mesh.embedder_address),
        ("tollgate.storage.v1.ObjectService", "filesystem", real, mesh.storage_address),
        ("tollgate.storage.v1.ObjectService", "mock", mock, mesh.storage_address),
        ("tollgate.storage.v1.VectorService", "pgvector", real, mesh.storage_address),
        ("tollgate.storage.v1.VectorService", "mock", mock, mesh.storage_address),
        ("tollgate.corpus.v1.CorpusService", "corpus", real, mesh.corpus_address),
    ]
    return [
        Route(_ROOM_OF[service], service, provider, kind, address)
        for service, provider, kind, address in listed
    ]


def nothing_held(metadata: Metadata) -> tuple[tuple[str, str | bytes], ...]:
    """The trailers of a call that was refused before the gate saw it: a receipt for nothing."""
    receipt = answer_pb2.Receipt(request_id=request_id_of(metadata))
    return ((calls.RECEIPT, receipt.SerializeToString()),)


@asynccontextmanager
async def wire(mesh: MeshSettings, settings: Settings) -> AsyncIterator[Daemon]:
    """Start the router; it serves until the context ends."""
    routes = (
        default_routes(mesh)
        if settings.backends is None
        else [backend.route() for backend in settings.backends]
    )
    backends = [Backend(route, needs_models=route.grpc_service == _EMBEDDER) for route in routes]
    keys = None
    if settings.authentication is Authentication.KEYS:
        keys = KeyFile(settings.keys_file or default_path(mesh.state_dir))
    modes = StandingModes(mesh, settings.modes())
    daemon = Daemon(
        "router",
        mesh,
        listen=settings.listen,
        authenticate=authenticator(mesh.secret, keys),
        refused=nothing_held,
    )

    def tell(changed: Backend) -> None:
        """A fronted service serves for as long as one of its backends does."""
        service = changed.route.grpc_service
        able = any(b.health is Health.SERVING for b in backends if b.route.grpc_service == service)
        finish(daemon.set_health(service, serving=able))

    peers = BackendPeers(backends, mesh, tell)
    ledger = LedgerPeer(
        mesh.cost_address,
        mesh,
        waiting_max=settings.waiting_max,
        settle_for_s=settings.settle_for_s,
    )
    gate = Gate(
        backends,
        peers,
        ledger,
        modes,
        Rules(settings.callers_may_choose, settings.attempts_max),
        GateMeters(),
        mesh.secret,
    )
    router_pb2_grpc.add_RouterServiceServicer_to_server(
        RouterService(backends, modes), daemon.server
    )
    daemon.server.add_generic_rpc_handlers(handlers(gate, metered()))
    daemon.serves(SERVICE)
    for name in _ROOM_OF:
        daemon.serves(name, serving=False)
    try:
        async with modes.kept():
            peers.watch()
            async with daemon.serving():
                yield daemon
    finally:
        await ledger.close(mesh.grace_s)
        await peers.close()


class GateMeters:
    """What the gate counts, as OpenTelemetry has it."""

    def __init__(self) -> None:
        meter = telemetry.meter()
        self._attributes: dict[tuple[str, str, str], dict[str, str]] = {}
        self._attempts = meter.create_counter(
            "tollgate.router.attempts",
            unit="{attempt}",
            description="Attempts at calls, by backend and outcome.",
        )
        self._fallbacks = meter.create_counter(
            "tollgate.router.fallbacks",
            unit="{call}",
            description="Calls answered by another backend than the first asked.",
        )

    def attempted(self, backend: Backend, outcome: str) -> None:
        """One attempt ended so."""
        key = (backend.route.service, backend.provider, outcome)
        attributes = self._attributes.get(key)
        if attributes is None:
            names = ("tollgate.service", "tollgate.provider", "tollgate.outcome")
            attributes = self._attributes[key] = dict(zip(names, key, strict=True))
        self._attempts.add(1, attributes)

    def fell_back(self, service: str) -> None:
        """A call was answered by another backend than the first asked."""
        self._fallbacks.add(1, {"tollgate.service": service})


if __name__ == "__main__":
    launch(wire, Settings)
