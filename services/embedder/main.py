"""The embedder daemon: `python -m services.embedder.main`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field
from tollgate.embedder.v1 import embedder_pb2_grpc

from chassis import telemetry
from chassis.server import Daemon, StartError, launch
from chassis.settings import Address, MeshSettings, RoomSettings, SettingsError, load, room_config
from services.embedder import providers
from services.embedder.core import Embedder, Provider
from services.embedder.service import EmbedderService

SERVICE = "tollgate.embedder.v1.EmbedderService"

log = logging.getLogger(__name__)


def _names(value: str) -> str:
    unknown = sorted(set(value.split(",")) - set(providers.names()))
    if unknown:
        raise ValueError(
            f"no provider is named {', '.join(unknown)}: {', '.join(providers.names())}"
        )
    return value


class Settings(RoomSettings):
    """Settings of the embedder, under TOLLGATE_EMBEDDER_; each provider has its own besides."""

    model_config = room_config("embedder")

    listen: Address = Field("127.0.0.1:50053", description="Where the embedder listens.")
    providers: Annotated[str, AfterValidator(_names)] = Field(
        "minilm,mock",
        description="The providers that serve, the preferred one first, with commas between.",
    )
    inputs_max: int = Field(2_048, ge=1, description="The most texts of a call.")
    waiting_max: int = Field(
        1_024, ge=1, description="Calls that may wait for a provider; more are OVERLOADED."
    )


@asynccontextmanager
async def wire(mesh: MeshSettings, settings: Settings) -> AsyncIterator[Daemon]:
    """Start the embedder; the daemon serves until the context ends."""
    names = settings.providers.split(",")
    embedder = Embedder(
        [_provider(name, mesh.state_dir / "embedder") for name in names],
        inputs_max=settings.inputs_max,
        waiting_max=settings.waiting_max,
        on_batch=_batch_sizes(),
    )
    try:
        faults = await embedder.start()
        if len(faults) == len(names):
            raise StartError("; ".join(f"{name}: {fault}" for name, fault in faults.items()))
        daemon = Daemon("embedder", mesh, listen=settings.listen)
        embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(
            EmbedderService(embedder), daemon.server
        )
        daemon.serves(SERVICE, providers=names)
        for name, fault in faults.items():
            log.error("a provider is down", extra={"fields": {"provider": name, "why": str(fault)}})
            await daemon.set_health(f"{SERVICE}/{name}", serving=False)
        async with daemon.serving():
            yield daemon
    finally:
        await embedder.close()


def _provider(name: str, cache_dir: Path) -> Provider:
    file = providers.file_of(name)
    try:
        _, own = load(MeshSettings, file.Settings)
    except SettingsError as error:
        raise StartError("; ".join(error.faults)) from None
    return file.provider(own, cache_dir)


def _batch_sizes() -> Callable[[str, int], None]:
    sizes = telemetry.meter().create_histogram(
        "tollgate.embedder.batch_size",
        unit="{call}",
        description="How many portions of calls travelled together to a provider.",
    )
    attributes: dict[str, dict[str, str]] = {}

    def record(provider: str, size: int) -> None:
        if provider not in attributes:
            attributes[provider] = {"tollgate.provider": provider}
        sizes.record(size, attributes[provider])

    return record


if __name__ == "__main__":
    launch(wire, Settings)
