"""What is spent and by whom: usage, scopes, accounts and the metrics that limits count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, TypeAlias

from chassis.errors import InvalidField, Violation

INT64_MAX = (1 << 63) - 1


class Metric(IntEnum):
    """What a limit counts; the numbers are those of the wire."""

    COST = 1
    TOKENS = 2
    REQUESTS = 3
    PAGES = 4
    BYTES = 5


class Usage(NamedTuple):
    """What a call used or may use at most, in units."""

    tokens: int = 0
    pages: int = 0
    bytes: int = 0
    requests: int = 0


class Scope(NamedTuple):
    """Who spends and on what, the operation included."""

    tenant: str
    project: str
    service: str
    provider: str
    model: str
    operation: str
    simulated: bool


@dataclass(frozen=True, slots=True, eq=False)
class Account:
    """A scope under the number that the store gave it; there is one object for each."""

    number: int
    scope: Scope


Amounts: TypeAlias = tuple[int, int, int, int, int]
"""What is counted, by metric: nano-dollars, tokens, requests, pages, bytes."""

NOTHING: Amounts = (0, 0, 0, 0, 0)


def amounts(nanos_usd: int, usage: Usage) -> Amounts:
    """What limits count of a usage at its price; `metric - 1` is the place of a metric."""
    tokens, pages, size, requests = usage
    return (nanos_usd, tokens, requests, pages, size)


def checked_usage(field: str, tokens: int, pages: int, size: int, requests: int) -> Usage:
    """A usage whose units are 0 or more; whatever was used, it was one request at least.

    Raises InvalidField naming the unit, as `bound.tokens`.
    """
    if tokens < 0 or pages < 0 or size < 0 or requests < 0:
        unit = next(
            name
            for name, n in zip(Usage._fields, (tokens, pages, size, requests), strict=True)
            if n < 0
        )
        raise InvalidField.of(f"{field}.{unit}", "must be 0 or more")
    return Usage(tokens, pages, size, requests or 1)


def refused(faults: Sequence[Violation]) -> InvalidField:
    """One error that names all the fields at fault."""
    said = "; ".join(f"{fault.subject}: {fault.description}" for fault in faults)
    return InvalidField(said, violations=faults)
