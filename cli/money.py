"""Amounts of money for people: whole nano-dollars in, exact decimal text out, never a float."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, InvalidOperation

NANOS = 1_000_000_000
_DIGITS = 9
_NANOS_MAX = 2**63 - 1


def usd(nanos: int, *, digits: int = 2) -> str:
    """`1_500_000_000` as `$1.50`: exact, with as many decimals as needed and at least `digits`."""
    whole, rest = divmod(abs(nanos), NANOS)
    decimals = f"{rest:0{_DIGITS}d}".rstrip("0").ljust(digits, "0")
    return f"{'-' if nanos < 0 else ''}${whole:,}{'.' if decimals else ''}{decimals}"


def usd_column(amounts: Sequence[int]) -> list[str]:
    """Amounts with equally many decimals, so that they stand under one another. Exact."""
    digits = max((len(usd(nanos).rpartition(".")[2]) for nanos in amounts), default=2)
    return [usd(nanos, digits=digits) for nanos in amounts]


def parse_usd(text: str) -> int:
    """`20`, `0.5` or `$1.50` as nano-dollars. Raises ValueError saying what is wrong."""
    try:
        amount = Decimal(text.strip().removeprefix("$")) * NANOS
    except InvalidOperation:
        raise ValueError(f"{text!r} is not an amount in USD, such as 20 or 0.50") from None
    if not amount.is_finite() or amount < 0:
        raise ValueError(f"{text!r} must be an amount of 0 or more")
    if amount != amount.to_integral_value():
        raise ValueError(
            f"{text!r} has more than nine decimals: the smallest amount is $0.000000001"
        )
    if amount > _NANOS_MAX:
        raise ValueError(
            f"{text!r} is more than the ledger can count: {usd(_NANOS_MAX)} at the most"
        )
    return int(amount)
