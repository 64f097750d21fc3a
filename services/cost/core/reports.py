"""Reports: how a time range is cut into buckets, and what a row of usage says."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import IntEnum
from typing import NamedTuple

from chassis.errors import InvalidField
from services.cost.core.limits import Limit
from services.cost.core.usage import Scope, Usage
from services.cost.core.windows import QUARTER_HOUR, Span, Window, quarter_hour, span

BUCKETS_MAX = 40_000
"""A little more than the quarter hours of a year."""


class Group(IntEnum):
    """A dimension that usage can be grouped by; the numbers are those of the wire."""

    TENANT = 1
    PROJECT = 2
    SERVICE = 3
    PROVIDER = 4
    MODEL = 5
    OPERATION = 6
    SIMULATED = 7


class Bucket(IntEnum):
    """The width of a time bucket; the numbers are those of the wire."""

    WHOLE = 0
    QUARTER_HOUR = 1
    HOUR = 2
    DAY = 3
    MONTH = 4


@dataclass(frozen=True, slots=True)
class UsageQuery:
    """What to report: quarters of an hour from `start` to before `end`."""

    start: datetime
    end: datetime
    group_by: tuple[Group, ...] = ()
    bucket: Bucket = Bucket.WHOLE
    time_zone: str = "UTC"
    tenant: str = ""


class UsageRow(NamedTuple):
    """One row of a report; dimensions that were not asked for are empty."""

    bucket_time: datetime
    scope: Scope
    usage: Usage
    charged_nanos_usd: int
    unconfirmed_nanos_usd: int
    charges: int


class Consumption(NamedTuple):
    """What one counter of a limit has in its current window."""

    limit: Limit
    counter: str
    window: Span
    held: int
    settled: int


_WINDOWS = {Bucket.HOUR: Window.HOUR, Bucket.DAY: Window.DAY, Bucket.MONTH: Window.MONTH}


def widened(start: datetime, end: datetime) -> tuple[datetime, datetime]:
    """The range in whole quarters of an hour. Raises InvalidField where it is upside down."""
    if start >= end:
        raise InvalidField.of("end_time", "must be later than start_time")
    first, last = quarter_hour(start), quarter_hour(end)
    return first, last if last == end else last + QUARTER_HOUR


def bucket_starts(query: UsageQuery) -> list[datetime]:
    """The starts of a query's buckets; the first is the start of the range itself.

    Raises InvalidField where there would be too many.
    """
    starts = [query.start]
    if query.bucket is Bucket.WHOLE:
        return starts
    while (end := _end(query, starts[-1])) < query.end:
        starts.append(end)
        if len(starts) > BUCKETS_MAX:
            raise InvalidField.of("bucket", f"cuts the range into more than {BUCKETS_MAX}")
    return starts


def _end(query: UsageQuery, start: datetime) -> datetime:
    if query.bucket is Bucket.QUARTER_HOUR:
        return start + QUARTER_HOUR
    end = span(_WINDOWS[query.bucket], query.time_zone, start).end
    assert end is not None, "an hour, a day and a month end"
    # Zones of long ago were off by odd seconds; rollups know quarters of an hour only.
    return max(quarter_hour(end), start + timedelta(minutes=15))
