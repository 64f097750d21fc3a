"""The limits and prices that decisions are made by, at one version."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from services.cost.core.limits import LimitSet
from services.cost.core.prices import PriceList, Rate
from services.cost.core.usage import Account

_RATES_MAX = 50_000


@dataclass(slots=True)
class Catalog:
    """Limits and prices at one version, and the span in which no price takes effect."""

    version: int
    price_version: int
    limits: LimitSet
    prices: PriceList
    since: datetime
    until: datetime
    _current: dict[Account, Rate] = field(default_factory=dict)
    _older: dict[tuple[int, int, datetime], Rate] = field(default_factory=dict)

    def is_current(self, version: int, now: datetime) -> bool:
        """Whether decisions at this instant may be made by it."""
        return version == self.version and self.since <= now < self.until

    def rate(self, account: Account) -> Rate:
        """What new holds of an account are made at. Raises PriceUnknown."""
        rate = self._current.get(account)
        if rate is None:
            if len(self._current) >= _RATES_MAX:
                self._current.clear()
            rate = self.prices.rate(account.scope, self.price_version, self.since)
            self._current[account] = rate
        return rate

    def rate_of(self, account: Account, price_version: int, at: datetime) -> Rate:
        """What a hold was made at, by a version of the list, at a time."""
        if price_version == self.price_version and at >= self.since:
            return self.rate(account)
        key = (account.number, price_version, self.prices.steady(at)[0])
        rate = self._older.get(key)
        if rate is None:
            if len(self._older) >= _RATES_MAX:
                self._older.clear()
            rate = self._older[key] = self.prices.rate(account.scope, price_version, key[2])
        return rate
