"""Holds as the gate knows them: ids, expected charges, refusals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from fractions import Fraction
from uuid import RFC_4122, UUID, uuid5

from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import BudgetExhausted, RateLimited
from services.router.core.holds import (
    _NAMESPACE,
    PriceLine,
    Refusal,
    Units,
    expected_nanos_usd,
    hold_id,
    refused,
)

NOW = datetime(2026, 5, 17, 12, tzinfo=UTC)

_names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=8)
_attempts = st.tuples(_names, _names, _names, st.integers(1, 9))
_units = st.builds(Units, *[st.integers(0, 10**9)] * 4)
_lines = st.lists(
    st.builds(PriceLine, st.sampled_from(Units._fields), st.integers(0, 10**12)),
    unique_by=lambda line: line.unit,
)


@given(_attempts, _attempts)
def test_each_attempt_has_one_id(one: tuple[str, ...], other: tuple[str, ...]) -> None:
    """The same tenant, call, provider and attempt have the same UUIDv5; others have others."""
    assert (hold_id(*one) == hold_id(*other)) == (one == other)  # type: ignore[arg-type]  # splat
    found = UUID(hold_id(*one))  # type: ignore[arg-type]  # splat
    assert (found.version, found.variant) == (5, RFC_4122)
    assert found == uuid5(_NAMESPACE, "\n".join(map(str, one)))


@given(_units, _lines)
def test_a_charge_is_rounded_up_once(units: Units, lines: list[PriceLine]) -> None:
    """What is expected is the exact price, rounded up to a whole nano-dollar, never below it."""
    counted = units if units.requests else units._replace(requests=1)
    exact = sum(
        (Fraction(getattr(counted, unit) * nanos, 1_000_000) for unit, nanos in lines),
        start=Fraction(),
    )
    assert 0 <= expected_nanos_usd(units, lines) - exact < 1


def _refusal(window: str, metric: str = "COST") -> Refusal:
    return Refusal("daily", "10 USD a day", metric, window, 100, 90, 20, 10)


def test_a_denial_names_its_limits_and_by_how_much() -> None:
    """BUDGET_EXHAUSTED has a violation a limit, and says when to come again."""
    error = refused([_refusal("DAY")], NOW + timedelta(hours=2), NOW)
    assert isinstance(error, BudgetExhausted)
    assert error.retry_after_s == 7200
    assert error.violations[0].subject == "limit/daily"
    assert error.violations[0].description.startswith("10 nano-dollars over")
    assert "10 USD a day" in error.message


def test_minutes_alone_are_a_rate() -> None:
    """A denial is RATE_LIMITED only where every limit that refused is of a minute."""
    minute, day = _refusal("MINUTE", "REQUESTS"), _refusal("DAY")
    assert isinstance(refused([minute], NOW, NOW), RateLimited)
    assert isinstance(refused([minute, day], NOW, NOW), BudgetExhausted)


def test_what_can_never_fit_has_no_time() -> None:
    """Without a time at which it may fit, a denial asks nobody to come again."""
    spent = refused([_refusal("LIFETIME")], None, NOW)
    assert spent.retry_after_s is None
    assert "waiting does not help" in spent.message


def test_what_no_minute_fits_is_no_rate() -> None:
    """Larger than a minute's maximum is BUDGET_EXHAUSTED, naming the limit that must be raised."""
    large = _refusal("MINUTE", "TOKENS")._replace(requested=101)
    error = refused([large, _refusal("MINUTE")], None, NOW)
    assert isinstance(error, BudgetExhausted)
    assert error.retry_after_s is None
    assert (
        error.message == "the call is larger than the limit 10 USD a day allows at once; raise it"
    )
