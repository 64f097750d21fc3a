"""The modes as they are kept: all SQL of the router."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from chassis.postgres import Pool, transaction
from services.router.core.routes import Mode, ModeSetting

MIGRATIONS = Path(__file__).parent / "migrations"

_LATEST = """
SELECT DISTINCT ON (service) service, mode, set_at, set_by
FROM mode_changes ORDER BY service, number DESC
"""
_CHANGE = """
INSERT INTO mode_changes (service, mode, set_by) SELECT service, $2, $3 FROM unnest($1::text[])
AS service
"""


async def read_modes(pool: Pool) -> dict[str, ModeSetting]:
    """The latest switch of each service that was ever switched."""
    async with transaction(pool) as connection:
        rows = await connection.fetch(_LATEST)
    return {
        row["service"]: ModeSetting(Mode(row["mode"]), row["set_at"], row["set_by"]) for row in rows
    }


async def switch_mode(pool: Pool, services: Iterable[str], mode: Mode, set_by: str) -> None:
    """Remember that these services have this mode from now on."""
    async with transaction(pool) as connection:
        await connection.execute(_CHANGE, list(services), mode.value, set_by)
