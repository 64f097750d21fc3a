"""Windows: the spans of time in which limits count, keyed by their start in UTC.

Minutes and hours are those of UTC. A day starts at the first instant of its local date and ends
where the next one starts, so days and months cover all time without a gap or an overlap, also where
clocks are moved at midnight or a date is left out.
"""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from enum import IntEnum
from functools import lru_cache
from typing import NamedTuple
from zoneinfo import ZoneInfo

from chassis.errors import InvalidField

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MINUTE = timedelta(minutes=1)
_HOUR = timedelta(hours=1)
_DAY = timedelta(days=1)
QUARTER_HOUR = timedelta(minutes=15)


class Window(IntEnum):
    """The window of a limit; the numbers are those of the wire."""

    MINUTE = 1
    HOUR = 2
    DAY = 3
    MONTH = 4
    LIFETIME = 5


class Span(NamedTuple):
    """From `start` to before `end`; a lifetime has no end."""

    start: datetime
    end: datetime | None


def span(window: Window, time_zone: str, at: datetime) -> Span:
    """The window that holds an instant."""
    if window is Window.MINUTE:
        return _even(_MINUTE, at)
    if window is Window.HOUR:
        return _even(_HOUR, at)
    if window is Window.DAY:
        return _day(_zone(time_zone), at)
    if window is Window.MONTH:
        return _month(_zone(time_zone), at)
    return Span(EPOCH, None)


def quarter_hour(at: datetime) -> datetime:
    """The start of the quarter of an hour that holds an instant."""
    return _even(QUARTER_HOUR, at).start


def checked_zone(field: str, name: str) -> str:
    """The name of an IANA time zone; UTC where none was given. Raises InvalidField."""
    try:
        _zone(name or "UTC")
    except (KeyError, ValueError, OSError):
        raise InvalidField.of(field, "must be an IANA time zone, such as Europe/Berlin") from None
    return name or "UTC"


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    return ZoneInfo(name)


def _even(width: timedelta, at: datetime) -> Span:
    start = at - (at - EPOCH) % width
    return Span(start, start + width)


def _day(zone: ZoneInfo, at: datetime) -> Span:
    day = at.astimezone(zone).date()
    # Clocks that were put back just after midnight show the date before once more.
    while (end := first_instant(zone, day + _DAY)) <= at:
        day += _DAY
    return Span(first_instant(zone, day), end)


def _month(zone: ZoneInfo, at: datetime) -> Span:
    # The day that holds the instant, which is not always the date that local clocks show.
    noon = _day(zone, at).start + timedelta(hours=12)
    first = noon.astimezone(zone).date().replace(day=1)
    return Span(first_instant(zone, first), first_instant(zone, _next_month(first)))


def _next_month(first: date) -> date:
    return (first + timedelta(days=32)).replace(day=1)


@lru_cache(maxsize=4096)
def first_instant(zone: ZoneInfo, day: date) -> datetime:
    """The first instant, in UTC, at which local clocks show this date or a later one."""
    midnight = datetime(day.year, day.month, day.day)
    found = midnight.replace(tzinfo=zone).astimezone(UTC)
    if found.astimezone(zone).replace(tzinfo=None) == midnight:
        return found
    # Clocks were put forward over midnight: it is the moment at which they were. Reading midnight
    # by the offset after and by the one before gives an instant on either side of that moment.
    low = midnight.replace(tzinfo=zone, fold=1).astimezone(UTC)
    while found - low > timedelta(seconds=1):
        middle = low + timedelta(seconds=(found - low) // timedelta(seconds=1) // 2)
        if middle.astimezone(zone).date() < day:
            low = middle
        else:
            found = middle
    return found
