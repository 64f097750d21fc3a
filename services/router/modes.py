"""The standing modes: read from the database each second, so that all routers agree."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress

from chassis.database import room_pool
from chassis.embedded import EmbeddedPostgresError
from chassis.errors import ProviderUnavailable
from chassis.postgres import MigrationError, Pool, is_database_away
from chassis.settings import MeshSettings
from chassis.telemetry import place_of
from services.router.core.routes import Mode, Modes, ModeSetting
from services.router.store import MIGRATIONS, read_modes, switch_mode

POLL_S = 1.0
# How long a start waits for the database before it serves with the modes of the settings.
FIRST_READ_S = 5.0

log = logging.getLogger(__name__)


class StandingModes:
    """The modes that hold now. Without its database a router serves with the last that it knew."""

    def __init__(self, mesh: MeshSettings, settled: Mapping[str, Mode]) -> None:
        self._mesh = mesh
        self._settled = {service: ModeSetting(mode) for service, mode in settled.items()}
        self.current: Modes = self._settled
        self._pool: Pool | None = None
        self._known = asyncio.Event()

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        """Keep `current` as the database has it, until the context ends."""
        keeping = asyncio.create_task(self._keep())
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(FIRST_READ_S):
                    await self._known.wait()
            yield
        finally:
            keeping.cancel()
            with suppress(asyncio.CancelledError):
                await keeping

    async def switch(self, services: Iterable[str], mode: Mode, set_by: str) -> Modes:
        """Switch these services for every call from the next on; answers all modes.

        Raises ProviderUnavailable where the database is away: nothing was switched.
        """
        if self._pool is None:
            raise ProviderUnavailable("modes cannot be kept now: the database is away")
        try:
            await switch_mode(self._pool, services, mode, set_by)
            await self._read(self._pool)
        except Exception as error:
            if not is_database_away(error):
                raise
            raise ProviderUnavailable("modes cannot be kept now: the database is away") from None
        return self.current

    async def _keep(self) -> None:
        while True:
            try:
                async with room_pool(self._mesh, "router", MIGRATIONS, size_max=2) as pool:
                    self._pool = pool
                    await self._poll(pool)
            except (MigrationError, EmbeddedPostgresError) as error:
                log.error("modes cannot be read", extra={"fields": {"why": str(error)}})
            except Exception as error:
                log.error("modes cannot be read", extra={"fields": place_of(error)})
            finally:
                self._pool = None
            await asyncio.sleep(POLL_S)

    async def _poll(self, pool: Pool) -> None:
        told = False
        while True:
            try:
                await self._read(pool)
                told = False
            except Exception as error:
                if not is_database_away(error):
                    raise
                if not told:
                    log.warning("the database of the modes is away; the last ones known hold")
                told = True
            await asyncio.sleep(POLL_S)

    async def _read(self, pool: Pool) -> None:
        self.current = self._settled | await read_modes(pool)
        self._known.set()
