"""What the ledger does by itself: expiry, partitions for the days ahead, a look at its own sums."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from services.cost.store.ledger import Ledger
from services.cost.store.reports import Reports

log = logging.getLogger(__name__)

PARTITIONS_EVERY_S = 6 * 3600.0


async def every(interval_s: float, what: str, work: Callable[[], Awaitable[None]]) -> None:
    """Do something again and again; a failure is logged and the next time tries anew."""
    while True:
        try:
            await work()
        except Exception as error:
            log.warning(f"{what} failed and is tried again", exc_info=error)
        await asyncio.sleep(interval_s)


class Upkeep:
    """The ledger's own work, in any number of processes at once."""

    def __init__(
        self, ledger: Ledger, reports: Reports, *, sweep_max: int, on_parity: Callable[[int], None]
    ) -> None:
        self._ledger, self._reports = ledger, reports
        self._sweep_max, self._on_parity = sweep_max, on_parity

    @asynccontextmanager
    async def running(self, *, sweep_s: float, parity_s: float) -> AsyncIterator[None]:
        """Do all of it until the context ends."""
        tasks = [
            asyncio.create_task(every(sweep_s, "expiry", self.sweep)),
            asyncio.create_task(every(PARTITIONS_EVERY_S, "making partitions", self.partition)),
            asyncio.create_task(every(parity_s, "the check of parity", self.check_parity)),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def sweep(self) -> None:
        """Charge every open hold whose time has passed, so many at a time."""
        while await self._ledger.expire(self._sweep_max) == self._sweep_max:
            pass

    async def partition(self) -> None:
        """Make the tables for the entries of the days ahead."""
        await self._ledger.make_partitions()

    async def check_parity(self) -> None:
        """Compare counters with what charges and open holds add up to."""
        differences = await self._reports.parity()
        self._on_parity(sum(abs(found.held) + abs(found.settled) for found in differences))
        for found in differences:
            log.error(
                "a counter is not what charges and open holds add up to",
                extra={"fields": {"limit": found.limit_id, "held": found.held}},
            )
