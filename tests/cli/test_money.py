"""Amounts: exact in both directions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cli.money import parse_usd, usd, usd_column

AMOUNTS = st.integers(min_value=0, max_value=2**63 - 1)


@given(AMOUNTS)
def test_what_is_printed_reads_back_to_the_nano_dollar(nanos: int) -> None:
    """No amount loses or gains a nano-dollar by being printed."""
    assert parse_usd(usd(nanos).replace(",", "")) == nanos


@pytest.mark.parametrize(
    ("nanos", "text"),
    [
        (0, "$0.00"),
        (1, "$0.000000001"),
        (1_500_000_000, "$1.50"),
        (10_000_000_000, "$10.00"),
        (123_456_789, "$0.123456789"),
        (1_234_567_000_000_000, "$1,234,567.00"),
        (-5_000_000, "-$0.005"),
    ],
)
def test_amounts_have_two_decimals_and_as_many_more_as_they_need(nanos: int, text: str) -> None:
    """Cents are always shown, and smaller parts only where there are any."""
    assert usd(nanos) == text


@given(st.lists(AMOUNTS, min_size=1))
def test_a_column_is_exact_and_its_points_stand_under_one_another(amounts: list[int]) -> None:
    """Amounts of one column have equally many decimals, and none is rounded."""
    column = usd_column(amounts)
    assert len({len(text.rpartition(".")[2]) for text in column}) == 1
    assert [parse_usd(text.replace(",", "")) for text in column] == amounts


@pytest.mark.parametrize("text", ["", "ten", "-1", "1e30", "nan", "inf", "0.0000000001", "1,5"])
def test_what_is_no_amount_is_refused_with_words(text: str) -> None:
    """Nothing is guessed from a malformed, negative, too fine or too large amount."""
    with pytest.raises(ValueError, match=r"USD|must be|decimals|more than"):
        parse_usd(text)


def test_a_dollar_sign_and_scientific_notation_are_amounts_too() -> None:
    """People paste what they see."""
    assert parse_usd("$20") == parse_usd("2e1") == 20_000_000_000
