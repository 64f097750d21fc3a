"""RouterService: which backends there are, and in which mode each service runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import grpc
from tollgate.router.v1 import router_pb2 as pb
from tollgate.router.v1 import router_pb2_grpc

from chassis.call import current
from chassis.errors import Forbidden, InvalidField
from services.router.core.routes import MODAL_SERVICES, Backend, Mode, Modes, ModeSetting

Context = grpc.aio.ServicerContext[Any, Any]


class StandingModes(Protocol):
    """The modes that hold, and how to switch them."""

    @property
    def current(self) -> Modes: ...

    async def switch(self, services: Iterable[str], mode: Mode, set_by: str) -> Modes: ...


class RouterService(router_pb2_grpc.RouterServiceServicer):
    """The gate itself, for those who run it."""

    def __init__(self, backends: Sequence[Backend], modes: StandingModes) -> None:
        self._backends = sorted(
            backends,
            key=lambda b: (b.route.service, b.route.grpc_service, b.simulated, b.route.priority),
        )
        self._modes = modes

    async def ListBackends(
        self, request: pb.ListBackendsRequest, context: Context
    ) -> pb.ListBackendsResponse:
        return pb.ListBackendsResponse(
            backends=[
                _backend(backend)
                for backend in self._backends
                if request.service in ("", backend.route.service)
            ]
        )

    async def GetMode(self, request: pb.GetModeRequest, context: Context) -> pb.GetModeResponse:
        return pb.GetModeResponse(modes=_modes(self._modes.current))

    async def SetMode(self, request: pb.SetModeRequest, context: Context) -> pb.SetModeResponse:
        call = current()
        if not call.operator:
            raise Forbidden("modes are switched by operators")
        if request.service not in ("", *MODAL_SERVICES):
            raise InvalidField.of("service", f"must be one of {', '.join(MODAL_SERVICES)}")
        services = [request.service] if request.service else MODAL_SERVICES
        switched = await self._modes.switch(services, _mode(request.mode), call.tenant)
        return pb.SetModeResponse(modes=_modes(switched))


def _mode(mode: pb.Mode.ValueType) -> Mode:
    try:
        return Mode(pb.Mode.Name(mode).removeprefix("MODE_"))
    except ValueError:
        raise InvalidField.of("mode", "must be MOCK, REAL or HYBRID") from None


def _modes(modes: Modes) -> list[pb.ServiceMode]:
    return [_service_mode(service, modes[service]) for service in MODAL_SERVICES]


def _service_mode(service: str, setting: ModeSetting) -> pb.ServiceMode:
    found = pb.ServiceMode(
        service=service, mode=pb.Mode.Value(f"MODE_{setting.mode}"), set_by=setting.set_by
    )
    if setting.set_at is not None:
        found.set_time.FromDatetime(setting.set_at)
    return found


def _backend(backend: Backend) -> pb.Backend:
    return pb.Backend(
        service=backend.route.service,
        provider=backend.provider,
        kind=pb.BackendKind.Value(f"BACKEND_KIND_{backend.route.kind}"),
        address=backend.route.address,
        priority=backend.route.priority,
        health=pb.BackendHealth.Value(f"BACKEND_HEALTH_{backend.health}"),
        in_flight=backend.in_flight,
        calls=backend.calls,
        failures=backend.failures,
        latency_ms=backend.latency_s * 1000,
    )
