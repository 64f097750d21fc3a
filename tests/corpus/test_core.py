"""The corpus's rules: ids, limits of input, and what errors mean."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis import errors
from services.corpus import core
from services.corpus.chunking import Chunk
from services.corpus.core import Changes, Document, Next, Stage, State, Ticket, call_id, meaning
from services.corpus.pipeline import batches_of, vectors_at_once

TICKET = Ticket("acme", "default", "0b7c6f5e-32d4-4a5b-9f0e-5f0f4f1f2a11", 1)


def document(**fields: object) -> Document:
    at = datetime(2026, 2, 3, 4, 5, 6, 789012, UTC)
    made = Document(
        uid=TICKET.uid,
        collection="default",
        document_id="d",
        file_name="",
        media_type="",
        size_bytes=1,
        sha256=b"",
        revision=1,
        state=State.STORED,
        reason="",
        message="",
        retry_at=None,
        pages_done=0,
        pages_total=0,
        chunks_done=0,
        chunks_total=0,
        charged_nanos_usd=0,
        request_id="",
        metadata={},
        created_at=at,
        updated_at=at,
        parsed_by=None,
        embedded_by=None,
    )
    return replace(made, **fields)  # type: ignore[arg-type]  # a test's own choice


def test_a_call_keeps_its_id_until_its_try_is_raised() -> None:
    """The same piece of work has the same call id; anything that differs makes another."""
    ids = {
        call_id(ticket, stage, batch, tries)
        for ticket in (TICKET, replace(TICKET, revision=2))
        for stage in (Stage.PARSE, Stage.EMBED)
        for batch in (0, 1)
        for tries in (0, 1)
    }
    assert len(ids) == 16
    assert call_id(TICKET, Stage.EMBED, 1, 0) in ids


def test_a_page_token_names_where_to_go_on() -> None:
    """A token is read back as the creation time, to the microsecond, and the uid."""
    made = document()
    assert core.read_page_token(core.page_token(made)) == (made.created_at, made.uid)
    assert core.read_page_token("") is None


@given(st.text(max_size=64))
def test_a_made_up_page_token_is_refused(token: str) -> None:
    """Any text that no list answered is INVALID_FIELD or the first page, never another error."""
    with contextlib.suppress(errors.InvalidField):
        assert core.read_page_token(token) is None or token


@pytest.mark.parametrize("value", ["", "a b", "../x", "a/b", "ü", "x" * 129, "a\n"])
def test_ids_are_plain(value: str) -> None:
    """What is no id is refused by name of the field."""
    with pytest.raises(errors.InvalidField) as refused:
        core.checked_id("document_id", value)
    assert refused.value.violations[0].subject == "document_id"


def test_inline_bytes_are_bounded() -> None:
    """No bytes and more than 32 MiB are refused, each with its own reason."""
    with pytest.raises(errors.InvalidField):
        core.checked_content(b"")
    with pytest.raises(errors.DocumentTooLarge):
        core.checked_content(b"x" * (core.CONTENT_BYTES_MAX + 1))
    assert core.checked_content(b"x") == b"x"


def test_metadata_is_bounded() -> None:
    """Too many pairs, nameless and oversized ones are refused."""
    for pairs in ({str(n): "" for n in range(65)}, {"": "x"}, {"k": "x" * 2_048}, {"k": "\0"}):
        with pytest.raises(errors.InvalidField):
            core.checked_metadata("metadata", pairs)


@pytest.mark.parametrize("text", ["", " \n\t", "é" * 4_097])
def test_queries_are_bounded(text: str) -> None:
    """A question has a word in it and at most 8 KiB."""
    with pytest.raises(errors.InvalidField):
        core.checked_query(text)


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (errors.DocumentEncrypted("x"), Next.FAIL),
        (errors.UnsupportedMediaType("x"), Next.FAIL),
        (errors.NotFound("x"), Next.FAIL),
        (errors.PriceUnknown("x"), Next.FAIL),
        (errors.BudgetExhausted("x", retry_after_s=60.0), Next.DEFER),
        (errors.BudgetExhausted("x"), Next.FAIL),
        (errors.RateLimited("x", retry_after_s=3.0), Next.WAIT),
        (errors.LedgerUnavailable("x"), Next.WAIT),
        (errors.NoBackend("x"), Next.WAIT),
        (errors.ProviderUnavailable("x"), Next.WAIT),
        (errors.CallReplayed("x"), Next.ANEW),
        (errors.IdReused("x"), Next.ANEW),
        (errors.OutcomeUnknown("x"), Next.COUNT),
        (errors.DeadlineExceeded("x"), Next.COUNT),
        (errors.Internal(), Next.COUNT),
    ],
)
def test_each_error_has_its_consequence(error: errors.TollgateError, what: Next) -> None:
    """Input fails at once, budgets defer, absence waits, unknown outcomes are counted."""
    assert meaning(error) is what


@given(st.integers(min_value=0, max_value=10_000), st.floats(min_value=0, max_value=60))
def test_waiting_is_bounded_and_never_shorter_than_asked(attempt: int, asked_s: float) -> None:
    """A wait is positive, at least what was asked for, and otherwise at most ten seconds."""
    waited_s = core.backoff_s(attempt, asked_s=asked_s)
    assert max(asked_s, 0.05) <= waited_s <= max(asked_s, 10.0)


@given(st.floats(min_value=0, max_value=100_000))
def test_a_deferral_ends_after_its_window_began(retry_after_s: float) -> None:
    """Deferred work starts after the budget is there, and within two seconds of it."""
    assert retry_after_s < core.deferral_s(retry_after_s) <= retry_after_s + 2.1


def chunk(ordinal: int, text: str) -> Chunk:
    return Chunk(ordinal, 1, 1, 0, len(text), (), "", text)


def test_batches_are_the_same_again_and_embed_no_text_twice() -> None:
    """Equal texts go together into one batch, all chunks are in one, and order decides."""
    chunks = [chunk(n, f"text {n % 5}") for n in range(23)]
    batches = batches_of(chunks, 2)
    assert [len(batch) for batch in batches] == [2, 2, 1]
    ordinals = sorted(c.ordinal for batch in batches for group in batch.values() for c in group)
    assert ordinals == list(range(23))
    assert batches_of(chunks, 2) == batches


def test_large_metadata_makes_messages_of_fewer_vectors() -> None:
    """A message of vectors stays within its bytes, whatever is remembered with each of them."""
    large = {f"{n:02}": "x" * 2_046 for n in range(64)}
    assert vectors_at_once(384, {}) == 512
    assert vectors_at_once(384, large) * 64 * 2_048 <= 8 << 20
    assert vectors_at_once(4_000, {"a": "b" * (9 << 20)}) == 1


async def test_a_change_wakes_those_who_watch_that_document() -> None:
    """Telling of one document wakes its watchers, no other's, and nobody who left."""
    changes = Changes()
    with changes.watch("a") as a, changes.watch("b") as b:
        changes.tell("a")
        assert a.is_set()
        assert not b.is_set()
    changes.tell("a")
    assert not changes._watching
