"""Rows of `holds`, as holds."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, Final

import asyncpg

from services.cost.core.catalog import Catalog
from services.cost.core.holds import Denial, Hold, Refusal, State
from services.cost.core.usage import Metric, Usage
from services.cost.core.windows import Window
from services.cost.store.accounts import Accounts

# What a hold has only when it is resolved comes as one column, which is null for most.
HOLD_COLUMNS: Final = """account, request_id, tokens, pages, bytes, requests, held_nanos_usd,
    price_version, state, create_time, expire_time,
    CASE WHEN state <> 1 THEN ARRAY[charged_nanos_usd, overrun_nanos_usd, unconfirmed::int,
        used_tokens, used_pages, used_bytes, used_requests] END,
    denial"""


_STATES: Final = {int(state): state for state in State}


class HoldReader:
    """Reads the rows of one batch; times that rows share are one object, which is quick to look up.

    The accounts of the rows are known.
    """

    def __init__(self, accounts: Accounts, catalog: Catalog) -> None:
        self._accounts, self._catalog = accounts, catalog
        self._times: dict[datetime, datetime] = {}

    def hold(self, hold_id: str, row: asyncpg.Record) -> Hold:
        """A hold of a row that has HOLD_COLUMNS after one column."""
        (
            _,
            number,
            request_id,
            tokens,
            pages,
            size,
            requests,
            held,
            price_version,
            state,
            create_time,
            expire_time,
            resolved,
            denial,
            *_,
        ) = row
        create_time = self._times.setdefault(create_time, create_time)
        account = self._accounts.by_number[number]
        hold = Hold(
            hold_id,
            account,
            request_id,
            Usage(tokens, pages, size, requests),
            held,
            price_version,
            self._catalog.rate_of(account, price_version, create_time),
            _STATES[state],
            create_time,
            self._times.setdefault(expire_time, expire_time),
        )
        if resolved is not None:
            hold.charged_nanos_usd, hold.overrun_nanos_usd, unconfirmed, *used = resolved
            hold.unconfirmed = bool(unconfirmed)
            hold.usage = None if used[0] is None else Usage(*used)
            hold.denial = None if denial is None else to_denial(denial)
        return hold


def from_denial(denial: Denial) -> str:
    """A denial as JSON."""
    refusals = [
        [r.limit_id, r.display_name, r.metric, r.window, r.maximum, r.consumed, r.requested]
        for r in denial.refusals
    ]
    retry_time = denial.retry_time.isoformat() if denial.retry_time else None
    return json.dumps({"refusals": refusals, "retry_time": retry_time})


def to_denial(document: dict[str, Any]) -> Denial:
    """A denial from JSON."""
    refusals = [
        Refusal(limit_id, name, Metric(metric), Window(window), maximum, consumed, requested)
        for limit_id, name, metric, window, maximum, consumed, requested in document["refusals"]
    ]
    retry_time = document["retry_time"]
    return Denial(refusals, datetime.fromisoformat(retry_time) if retry_time else None)
