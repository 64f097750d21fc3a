"""The embedder daemon: `python -m services.embedder.main`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

from pydantic import AfterValidator, Field

from chassis import telemetry
from chassis.server import Daemon, launch
from chassis.settings import MeshSettings, RoomSettings, load, room_config
from services.embedder import providers
from services.embedder.core import Embedder
from services.embedder.service import EmbedderService
from tollgate.embedder.v1 import embedder_pb2_grpc

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

    listen: str = Field("127.0.0.1:50053", description="Where the embedder listens.")
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
    files = {name: providers.file_of(name) for name in settings.providers.split(",")}
    made = [
        file.provider(load(file.Settings)[0], mesh.state_dir / "embedder")
        for file in files.values()
    ]
    embedder = Embedder(
        made,
        inputs_max=settings.inputs_max,
        waiting_max=settings.waiting_max,
        on_batch=_batch_sizes(),
    )
    faults = await embedder.start()
    try:
        for name, fault in faults.items():
            log.error(
                "a provider cannot serve",
                extra={"fields": {"provider": name, "why": fault.message}},
            )
        daemon = Daemon("embedder", mesh, listen=settings.listen)
        embedder_pb2_grpc.add_EmbedderServiceServicer_to_server(
            EmbedderService(embedder), daemon.server
        )
        daemon.serves(SERVICE, providers=list(files))
        async with daemon.serving():
            for name in faults:
                daemon.set_health(f"{SERVICE}/{name}", serving=False)
            yield daemon
    finally:
        await embedder.close()


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
