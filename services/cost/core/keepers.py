"""What the wire asks of the store.

All of it raises LedgerUnavailable where the database is away; `decide` answers it for each order.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, Protocol
from uuid import UUID

from services.cost.core.catalog import Catalog
from services.cost.core.holds import Hold, Order, Result, State
from services.cost.core.limits import Limit
from services.cost.core.prices import Price
from services.cost.core.reports import Consumption, UsageQuery, UsageRow


class LedgerKeeper(Protocol):
    """Decides orders, each on its own, those of many callers in one transaction."""

    async def decide(self, orders: list[Order], /) -> list[Result]:
        """The outcome of each order, or the error that it alone failed with."""


class CatalogKeeper(Protocol):
    """Reads and changes limits and prices."""

    async def reload(self) -> Catalog:
        """Limits and prices as they are now."""

    async def create_limit(self, limit: Limit, /) -> Limit:
        """Make a limit; the same again returns it. Raises InvalidField, AlreadyExists."""

    async def update_limit(self, limit_id: str, etag: str, changes: dict[str, Any], /) -> Limit:
        """Change some of CHANGEABLE. Raises InvalidField, NotFound, Conflict."""

    async def delete_limit(self, limit_id: str, etag: str, /) -> None:
        """Delete a limit. Raises NotFound, Conflict."""

    async def add_prices(self, lines: Sequence[Price], /) -> list[Price]:
        """Add price lines; those that are there stay. Raises AlreadyExists."""


class ReportKeeper(Protocol):
    """Reads holds and usage."""

    async def hold(self, tenant: str, hold_id: str, /) -> Hold:
        """One hold. Raises NotFound."""

    async def holds(
        self,
        tenant: str,
        request_id: str,
        state: State | None,
        after: tuple[datetime, UUID] | None,
        count_max: int,
        /,
    ) -> list[Hold]:
        """A tenant's holds, the newest first."""

    async def consumption(self, limits: Sequence[Limit], tenant: str = "", /) -> list[Consumption]:
        """The counters of limits in their current windows."""

    async def now(self) -> datetime:
        """The time, by the database's clock."""

    async def usage(
        self, query: UsageQuery, after: tuple[datetime, list[str]] | None, count_max: int, /
    ) -> list[UsageRow]:
        """Rows of a report, after the one of this bucket and dimensions. Raises InvalidField."""
