"""A daemon: bound, healthy, reflected, and drained when it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TypeVar

import grpc
import uvloop
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from grpc_channelz.v1._async import ChannelzServicer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha._async import ReflectionServicer

from chassis import tasks, telemetry
from chassis.embedded import EmbeddedPostgresError
from chassis.errors import TollgateError
from chassis.interceptors import (
    Authenticate,
    Context,
    Guard,
    Interceptor,
    Refused,
    mesh_identity,
)
from chassis.postgres import MigrationError, is_database_away
from chassis.settings import MeshSettings, RoomSettings, SettingsError, load

log = logging.getLogger(__name__)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
_REFLECTION = "grpc.reflection.v1.ServerReflection"

Room = TypeVar("Room", bound=RoomSettings)


# What a daemon may take to end beyond draining and finishing, twice, what is under way.
MARGIN_S = 5.0


class StartError(Exception):
    """A daemon cannot start. The message is one line for people: what is wrong and what to do."""


class _Health(HealthServicer):
    """Health whose watches can be ended: stopping would wait its whole grace for them."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[None]] = set()

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """As the library's, until `end_watches`."""
        # A task of its own: gRPC gives no status to a call whose own task is cancelled.
        watch = asyncio.create_task(super().Watch(request, context))
        self._watches.add(watch)
        try:
            await asyncio.wait({watch})
        finally:
            watch.cancel()
            self._watches.discard(watch)

    def end_watches(self) -> None:
        """End the watches under way; whoever watches was told NOT_SERVING before."""
        for watch in self._watches:
            watch.cancel()


class Daemon:
    """One gRPC server with the manners of the platform.

    Add servicers to `server`, name what it `serves`, then serve within `serving()`.
    """

    def __init__(
        self,
        room: str,
        mesh: MeshSettings,
        *,
        listen: str,
        authenticate: Authenticate | None = None,
        refused: Refused | None = None,
    ) -> None:
        self.room = room
        self.address = listen
        self._mesh = mesh
        self._health = _Health()
        self._status: dict[str, int] = {"": _SERVING}
        self._services: list[str] = []
        guard = Guard(authenticate or mesh_identity(mesh.secret), mesh.calls_max, refused)
        self.server = grpc.aio.server(interceptors=[Interceptor(guard)], options=_options(mesh))

    def serves(self, service: str, *, providers: Iterable[str] = (), serving: bool = True) -> None:
        """Name a service for health and reflection, and its providers for health.

        `serving` is how they are until `set_health` says otherwise.
        """
        self._services.append(service)
        for name in (service, *(f"{service}/{provider}" for provider in providers)):
            self._status[name] = _SERVING if serving else _NOT_SERVING

    async def set_health(self, name: str, *, serving: bool) -> None:
        """Say whether a service, or a provider as `service/provider`, can serve."""
        self._status[name] = _SERVING if serving else _NOT_SERVING
        await self._health.set(name, self._status[name])

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Daemon]:
        """Serve until the context ends, then drain: say so, wait, finish what is under way.

        Raises StartError where the address cannot be bound.
        """
        self._add_platform_services()
        self._bind()
        await self.server.start()
        for name, status in self._status.items():
            await self._health.set(name, status)
        log.info("serving", extra={"fields": {"address": self.address}})
        try:
            yield self
        finally:
            await self._health.enter_graceful_shutdown()
            await asyncio.sleep(self._mesh.drain_s)
            self._health.end_watches()
            await self.server.stop(self._mesh.grace_s)
            left = await tasks.drain(self._mesh.grace_s)
            log.info("stopped", extra={"fields": {"unfinished": left}})

    def _bind(self) -> None:
        try:
            port = self.server.add_insecure_port(self.address)
        except RuntimeError:
            raise StartError(
                f"{self.room}: cannot listen on {self.address}: it is in use or not ours; "
                f"stop what listens there or set TOLLGATE_{self.room.upper()}_LISTEN"
            ) from None
        host, colon, asked = self.address.rpartition(":")
        if colon and asked == "0":
            self.address = f"{host}:{port}"

    def _add_platform_services(self) -> None:
        names = [
            *self._services,
            health_pb2.DESCRIPTOR.services_by_name["Health"].full_name,
            channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name,
            reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"].full_name,
            _REFLECTION,
        ]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        channelz_pb2_grpc.add_ChannelzServicer_to_server(ChannelzServicer(), self.server)
        _add_reflection(ReflectionServicer(names), self.server)


def _options(mesh: MeshSettings) -> list[tuple[str, int]]:
    keepalive_ms = int(mesh.keepalive_s * 1000)
    return [
        # Two daemons must not silently share a port.
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", keepalive_ms),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", keepalive_ms // 3),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", keepalive_ms // 3),
        ("grpc.max_connection_age_ms", int(mesh.max_connection_age_s * 1000)),
        ("grpc.max_connection_age_grace_ms", int(mesh.grace_s * 1000)),
        ("grpc.max_receive_message_length", mesh.message_bytes_max),
        ("grpc.max_send_message_length", mesh.message_bytes_max),
    ]


def _add_reflection(servicer: ReflectionServicer, server: grpc.aio.Server) -> None:
    """Reflection under both of its names: the library has v1alpha only, clients ask for v1 first.

    The two have the same messages, but for the package.
    """
    reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]  # its stubs lack it
    pool = descriptor_pool.Default()
    try:
        pool.FindServiceByName(_REFLECTION)
    except KeyError:
        alpha = descriptor_pb2.FileDescriptorProto()
        reflection_pb2.DESCRIPTOR.CopyToProto(alpha)
        _rename(alpha)
        pool.Add(alpha)
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler(_REFLECTION, {"ServerReflectionInfo": handler}),)
    )


def _rename(file: descriptor_pb2.FileDescriptorProto) -> None:
    def renamed(name: str) -> str:
        return name.replace(".v1alpha", ".v1")

    file.name = file.name.replace("v1alpha", "v1")
    file.package = renamed(file.package)
    for message in file.message_type:
        for field in message.field:
            if field.type_name:
                field.type_name = renamed(field.type_name)
    for service in file.service:
        for method in service.method:
            method.input_type = renamed(method.input_type)
            method.output_type = renamed(method.output_type)


_NO_DATABASE = (
    "cannot reach the database: start it, or mend TOLLGATE_DATABASE_URL "
    "(and TOLLGATE_DATABASE_DIRECT_URL, where it is set)"
)

Wire = Callable[[MeshSettings, Room], AbstractAsyncContextManager[Daemon]]


def launch(wire: Wire[Room], settings: type[Room]) -> None:
    """Run a room until SIGTERM or SIGINT.

    Exits with 78 where settings are at fault, with 1 where it cannot start, else with 0.
    """
    room = settings.model_config.get("env_prefix", "").split("_")[1].lower()
    try:
        mesh, own = load(MeshSettings, settings)
    except SettingsError as error:
        for fault in error.faults:
            print(f"tollgate {room}: {fault}", file=sys.stderr)
        sys.exit(78)
    stop_telemetry = telemetry.start(room, mesh)
    try:
        uvloop.run(_run(wire(mesh, own), patience_s=mesh.drain_s + 2 * mesh.grace_s + MARGIN_S))
    except (StartError, EmbeddedPostgresError, MigrationError, TollgateError) as error:
        log.critical(str(error))
        sys.exit(1)
    except Exception as error:
        if is_database_away(error):
            log.critical(_NO_DATABASE)
        else:
            log.critical("cannot start", exc_info=True)
        sys.exit(1)
    finally:
        stop_telemetry()


async def _run(wired: AbstractAsyncContextManager[Daemon], *, patience_s: float) -> None:
    """Serve until told to stop; a start that is under way then is given up.

    One that has not ended `patience_s` after it was told is ended: nothing must stay behind.
    """
    told = asyncio.Event()
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    is_serving = False

    def stop() -> None:
        if told.is_set():
            return
        told.set()
        # A thread of its own, for a loop that no longer turns.
        watchdog = threading.Timer(patience_s, _end_at_once)
        watchdog.daemon = True
        watchdog.start()
        if not is_serving and task is not None:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    try:
        async with wired:
            is_serving = True
            await told.wait()
    except asyncio.CancelledError:
        if not told.is_set():
            raise


def _end_at_once() -> None:
    log.critical("did not end in time and is ended")
    os._exit(1)
