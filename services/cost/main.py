"""The cost daemon: `python -m services.cost.main`."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from pydantic import Field
from tollgate.cost.v1 import cost_pb2_grpc, limit_pb2_grpc, price_pb2_grpc, usage_pb2_grpc

from chassis.database import room_pool
from chassis.errors import TollgateError
from chassis.server import Daemon, StartError, launch
from chassis.settings import Address, MeshSettings, RoomSettings, room_config
from services.cost.core.prices import Origin, Price, read_rate_card
from services.cost.service import CostService, LimitService, PriceService, UsageService
from services.cost.store.accounts import Accounts
from services.cost.store.catalog import CatalogStore
from services.cost.store.ledger import Ledger
from services.cost.store.meters import Meters
from services.cost.store.reports import Reports
from services.cost.store.upkeep import Upkeep

SERVICES = tuple(f"tollgate.cost.v1.{name}Service" for name in ("Cost", "Limit", "Price", "Usage"))
MIGRATIONS = Path(__file__).with_name("migrations")
PRICES = Path(__file__).with_name("prices.json")


class Settings(RoomSettings):
    """Settings of the ledger, under TOLLGATE_COST_."""

    model_config = room_config("cost")

    listen: Address = Field("127.0.0.1:50051", description="Where the ledger listens.")
    prices_file: Path | None = Field(
        None, description="A rate card of your own (JSON), whose lines precede those carried."
    )
    hold_ttl_s: float = Field(
        120, ge=1, le=604_800, description="How long a hold stays open where its caller names none."
    )
    sweep_interval_s: float = Field(1, gt=0, description="How often expired holds are looked for.")
    sweep_max: int = Field(500, ge=1, le=1_000, description="Holds that expire in one batch.")
    parity_interval_s: float = Field(
        60, gt=0, description="How often counters are compared with what they must be."
    )
    batch_max: int = Field(
        512, ge=1, le=10_000, description="Orders that one transaction decides at the most."
    )
    batches_max: int = Field(2, ge=1, le=8, description="Transactions that are under way at once.")
    waiting_max: int = Field(
        4_096, ge=1, description="Calls that may wait for a batch; more are OVERLOADED."
    )
    pool_max: int = Field(8, ge=2, le=64, description="Connections to the database.")


@asynccontextmanager
async def wire(mesh: MeshSettings, settings: Settings) -> AsyncIterator[Daemon]:
    """Start the ledger; the daemon serves until the context ends."""
    lines = rate_card(PRICES, Origin.CARRIED)
    if settings.prices_file is not None:
        lines += rate_card(settings.prices_file, Origin.OPERATOR)
    async with room_pool(mesh, "cost", MIGRATIONS, size_max=settings.pool_max) as pool:
        catalog, accounts, meters = CatalogStore(pool), Accounts(), Meters()
        await _load(catalog, lines)
        ledger = Ledger(
            pool,
            catalog,
            accounts,
            orders_max=settings.batch_max,
            batches_max=settings.batches_max,
            waiting_max=settings.waiting_max,
            on_commit=meters.count,
        )
        reports = Reports(pool, catalog, accounts)
        upkeep = Upkeep(ledger, reports, sweep_max=settings.sweep_max, on_parity=meters.set_parity)
        await upkeep.partition()
        daemon = Daemon("cost", mesh, listen=settings.listen)
        cost_pb2_grpc.add_CostServiceServicer_to_server(
            CostService(ledger, reports, ttl_ms=int(settings.hold_ttl_s * 1000)), daemon.server
        )
        limit_pb2_grpc.add_LimitServiceServicer_to_server(
            LimitService(catalog, reports), daemon.server
        )
        price_pb2_grpc.add_PriceServiceServicer_to_server(PriceService(catalog), daemon.server)
        usage_pb2_grpc.add_UsageServiceServicer_to_server(UsageService(reports), daemon.server)
        for service in SERVICES:
            daemon.serves(service)
        async with (
            upkeep.running(sweep_s=settings.sweep_interval_s, parity_s=settings.parity_interval_s),
            daemon.serving(),
        ):
            yield daemon
        await ledger.close()


def rate_card(path: Path, origin: Origin) -> list[Price]:
    """The prices of a file. Raises StartError naming the file and the line at fault."""
    try:
        return read_rate_card(path.read_text(), origin)
    except (OSError, ValueError, TollgateError) as error:
        why = error.strerror if isinstance(error, OSError) else str(error)
        raise StartError(f"the rate card {path} cannot be used: {why}") from error


async def _load(catalog: CatalogStore, lines: list[Price]) -> None:
    try:
        await catalog.add_prices(lines)
    except TollgateError as error:
        raise StartError(
            f"the rate cards cannot be loaded: {error.message}; prices never change in place: "
            "give the line an effective time of its own"
        ) from error


def _spare_the_collector() -> None:
    """Look for cycles seldom: a batch makes tens of thousands of objects, and no cycle.

    At its usual pace the collector took a fifth of the ledger's time.
    """
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


if __name__ == "__main__":
    _spare_the_collector()
    launch(wire, Settings)
