"""What a limit's counters must stand at, computed anew from charges and open holds."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from typing import Final

from chassis.postgres import Connection
from services.cost.core.limits import Limit, Match, counter_name
from services.cost.core.usage import Metric, Scope
from services.cost.core.windows import Span, Window

_FOREVER: Final = datetime(9999, 1, 1, tzinfo=UTC)
_CHARGED: Final = {
    Metric.COST: "charged_nanos_usd",
    Metric.TOKENS: "tokens",
    Metric.REQUESTS: "requests",
    Metric.PAGES: "pages",
    Metric.BYTES: "bytes",
}
_HELD: Final = _CHARGED | {Metric.COST: "held_nanos_usd"}
# Of each dimension that may be exact, in the order of core.limits.DIMENSIONS.
_COLUMNS: Final = ("tenant", "project", "service", "provider", "model", "simulated::text")
_SOURCES: Final = {
    "rollups": "SELECT account, {} AS amount FROM rollups WHERE bucket >= $1 AND bucket < $2",
    "entries": "SELECT account, {} AS amount FROM entries "
    "WHERE write_time >= $1 AND hold_time >= $1 AND hold_time < $2",
    "holds": "SELECT account, {} AS amount FROM holds "
    "WHERE state = 1 AND create_time >= $1 AND create_time < $2",
}
_SUM: Final = """
SELECT tenant, project, service, provider, model, operation, simulated,
    sum(amount)::bigint AS amount
FROM ({source}) AS counted JOIN accounts ON number = account
WHERE {conditions}
GROUP BY number
"""


async def measure(connection: Connection, limit: Limit, span: Span) -> dict[str, tuple[int, int]]:
    """Held and settled of each counter of a limit in a window, in the metric's unit.

    Charges come from rollups, whose quarter hours make up every window but a minute's.
    """
    charged = "entries" if limit.window is Window.MINUTE else "rollups"
    held = await _sums(connection, limit, span, "holds", _HELD[limit.metric])
    settled = await _sums(connection, limit, span, charged, _CHARGED[limit.metric])
    return {name: (held[name], settled[name]) for name in sorted(held.keys() | settled.keys())}


async def _sums(
    connection: Connection, limit: Limit, span: Span, source: str, column: str
) -> defaultdict[str, int]:
    conditions, values = ["true"], []
    for dimension, name in zip(limit.scope, _COLUMNS, strict=True):
        if dimension.match is Match.EXACT:
            values.append(dimension.value)
            conditions.append(f"{name} = ${len(values) + 2}")
    rows = await connection.fetch(
        _SUM.format(source=_SOURCES[source].format(column), conditions=" AND ".join(conditions)),
        span.start,
        span.end or _FOREVER,
        *values,
    )
    sums: defaultdict[str, int] = defaultdict(int)
    for *scope, amount in rows:
        sums[counter_name(limit, Scope(*scope))] += amount
    return sums
