"""Prices: which lines an operation has at a time, and what a usage costs by them.

A line is for (provider, model, operation, unit) and holds from its effective time on. Model and
operation may be `*`. The most specific pair that has a line in effect decides alone: (model,
operation), (model, `*`), (`*`, operation), (`*`, `*`); lines of different pairs never mix. A call
is priced when at least one line matches; units without a line of that pair are not charged.
An operator's line precedes one that Tollgate carries; then the latest effective time counts.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import IntEnum
from typing import NamedTuple

from chassis.errors import InvalidField, PriceUnknown, Violation
from services.cost.core.usage import INT64_MAX, Scope, Usage, refused

ANY = "*"
NAME_MAX = 256
SOURCE_MAX = 1024
PER = 1_000_000
NOW = datetime.min.replace(tzinfo=UTC)
"""The effective time of a line that is to hold from the moment it is added."""
_ALWAYS = NOW
_NEVER = datetime.max.replace(tzinfo=UTC)


class Unit(IntEnum):
    """The unit that a price counts, in the order of Usage; the numbers are those of the wire."""

    TOKENS = 1
    PAGES = 2
    BYTES = 3
    REQUESTS = 4


class Origin(IntEnum):
    """Who set a price."""

    CARRIED = 0
    OPERATOR = 1


@dataclass(frozen=True, slots=True)
class Price:
    """One line of the price list: nano-dollars for a million units; 0 is free."""

    provider: str
    model: str
    operation: str
    unit: Unit
    nanos_usd_per_million: int
    effective_time: datetime
    source: str
    origin: Origin = Origin.OPERATOR
    version: int = 0


def place_of(line: Price) -> tuple[str, str, str, int, datetime, int]:
    """Where a line stands in the list, and what no two lines share."""
    return (
        line.provider,
        line.model,
        line.operation,
        line.unit,
        line.effective_time,
        line.origin,
    )


class Rate(NamedTuple):
    """The lines that a hold is made at, in nano-dollars per million; None where there is none."""

    tokens: int | None = None
    pages: int | None = None
    bytes: int | None = None
    requests: int | None = None


class PriceList:
    """All price lines, those of the past and of the future included."""

    def __init__(self, lines: Iterable[Price]) -> None:
        self._lines: dict[tuple[str, str, str], list[Price]] = {}
        times: set[datetime] = set()
        for line in lines:
            key = (line.provider, line.model, line.operation)
            self._lines.setdefault(key, []).append(line)
            times.add(line.effective_time)
        for found in self._lines.values():
            found.sort(key=lambda line: (line.origin, line.effective_time))
        self._times = sorted(times)

    def lines(self, provider: str = "") -> list[Price]:
        """All lines, or those of a provider, by provider, model, operation, unit and time."""
        return sorted(
            (
                line
                for key, lines in self._lines.items()
                for line in lines
                if provider in ("", key[0])
            ),
            key=place_of,
        )

    def steady(self, at: datetime) -> tuple[datetime, datetime]:
        """The span around `at`, its end excluded, in which no line takes effect."""
        place = bisect_right(self._times, at)
        start = self._times[place - 1] if place else _ALWAYS
        return start, self._times[place] if place < len(self._times) else _NEVER

    def rate(self, scope: Scope, version: int, at: datetime) -> Rate:
        """What an operation costs at a time, by the lines of a version of the list and before it.

        Raises PriceUnknown where no line matches.
        """
        for model in _specific_first(scope.model):
            for operation in _specific_first(scope.operation):
                lines = self._lines.get((scope.provider, model, operation), ())
                found = {
                    line.unit: line.nanos_usd_per_million
                    for line in lines
                    if line.version <= version and line.effective_time <= at
                }
                if found:
                    return Rate(*(found.get(unit) for unit in Unit))
        raise _unknown(scope)


def read_rate_card(text: str, origin: Origin) -> list[Price]:
    """The lines of a rate card: `{"prices": [{"provider": "openai", "model": "…" or "*",
    "operation": "…" or "*", "unit": "tokens", "nanos_usd_per_million": 20000000,
    "effective": "2024-01-25", "source": "…"}]}`.

    Raises ValueError that names the line at fault.
    """
    document = json.loads(text)
    lines = document.get("prices") if isinstance(document, dict) else None
    if not isinstance(lines, list):
        raise ValueError("must be an object with a list named prices")
    return [_read_line(place, line, origin) for place, line in enumerate(lines, 1)]


def _read_line(place: int, line: object, origin: Origin) -> Price:
    try:
        if not isinstance(line, dict):
            raise ValueError("must be an object")
        effective = datetime.fromisoformat(line["effective"])
        price = Price(
            provider=line["provider"],
            model=line["model"],
            operation=line["operation"],
            unit=Unit[line["unit"].upper()],
            nanos_usd_per_million=line["nanos_usd_per_million"],
            effective_time=effective if effective.tzinfo else effective.replace(tzinfo=UTC),
            source=line["source"],
            origin=origin,
        )
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"price {place}: {error}") from None
    return checked_price(price, f"price {place}")


def checked_price(price: Price, field: str = "price") -> Price:
    """The price as it is. Raises InvalidField naming every field at fault."""
    faults = [
        Violation(f"{field}.{name}", f"must be 1 to {NAME_MAX} characters; * stands for any")
        for name in ("provider", "model", "operation")
        if not _is_name(getattr(price, name))
    ]
    amount = price.nanos_usd_per_million
    if not isinstance(amount, int) or not 0 <= amount <= INT64_MAX:
        faults.append(Violation(f"{field}.unit_price.nanos_usd_per_million", "must be 0 or more"))
    if not isinstance(price.source, str) or len(price.source) > SOURCE_MAX or "\0" in price.source:
        faults.append(Violation(f"{field}.source", f"must have at most {SOURCE_MAX} characters"))
    if faults:
        raise refused(faults)
    return price


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= NAME_MAX and "\0" not in value


def cost(rate: Rate, usage: Usage) -> int:
    """The price of a usage in nano-dollars: the units at their lines, summed, then rounded up.

    Raises InvalidField where it does not fit 64 bits.
    """
    # Spelled out: this runs for every hold, twice.
    a_token, a_page, a_byte, a_request = rate
    tokens, pages, size, requests = usage
    total = (
        (a_token * tokens if a_token else 0)
        + (a_page * pages if a_page else 0)
        + (a_byte * size if a_byte else 0)
        + (a_request * requests if a_request else 0)
    )
    nanos_usd = -(-total // PER)
    if nanos_usd > INT64_MAX:
        raise InvalidField.of("usage", "costs more than the ledger can count")
    return nanos_usd


def _specific_first(name: str) -> tuple[str, ...]:
    return (ANY,) if name == ANY else (name, ANY)


def _unknown(scope: Scope) -> PriceUnknown:
    what = f"{scope.provider}/{scope.model or '(no model)'} {scope.operation or '(no operation)'}"
    return PriceUnknown(
        f"no price is known for {what}", violations=[Violation("price", f"set one for {what}")]
    )
