"""What the ledger counts of itself, for OpenTelemetry; once a batch, not once a hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from opentelemetry.metrics import CallbackOptions, Observation

from chassis import telemetry
from services.cost.core.holds import Hold
from services.cost.core.ledger import EntryKind
from services.cost.core.usage import Account
from services.cost.store.batch import Batch


class Meters:
    """The ledger's instruments, named `tollgate.cost.*`."""

    def __init__(self) -> None:
        meter = telemetry.meter()
        self._holds = meter.create_counter("tollgate.cost.holds", unit="{hold}")
        self._denials = meter.create_counter("tollgate.cost.denials", unit="{hold}")
        self._spend = meter.create_up_down_counter("tollgate.cost.spend", unit="{nano_usd}")
        self._overruns = meter.create_counter("tollgate.cost.overruns", unit="{nano_usd}")
        self._expired = meter.create_counter("tollgate.cost.expired", unit="{hold}")
        self._sizes = meter.create_histogram("tollgate.cost.batch_size", unit="{order}")
        self._parity = 0
        meter.create_observable_gauge(
            "tollgate.cost.parity",
            [self._observe_parity],
            unit="1",
            description="By how much counters differ from what charges and open holds add up to.",
        )

    def count(self, batch: Batch) -> None:
        """Count what a batch did, after it was committed."""
        self._sizes.record(len(batch.orders))
        for account, count in _by_account(batch.admitted):
            self._holds.add(count, _attributes(account))
        for account, count in _by_account(batch.denied):
            self._denials.add(count, _attributes(account))
        spend: Counter[Account] = Counter()
        for entry in batch.book.entries:
            spend[entry.account] += entry.charged_nanos_usd
            if entry.overrun_nanos_usd:
                self._overruns.add(entry.overrun_nanos_usd, _attributes(entry.account))
            if entry.kind is EntryKind.EXPIRED:
                self._expired.add(1, _attributes(entry.account))
        for account, nanos_usd in spend.items():
            self._spend.add(nanos_usd, _attributes(account))

    def set_parity(self, difference: int) -> None:
        """Say by how much counters are off."""
        self._parity = difference

    def _observe_parity(self, _: CallbackOptions) -> Iterable[Observation]:
        return [Observation(self._parity)]


def _by_account(holds: list[Hold]) -> Iterable[tuple[Account, int]]:
    return Counter(hold.account for hold in holds).items()


def _attributes(account: Account) -> dict[str, str | bool]:
    scope = account.scope
    return {
        "tollgate.service": scope.service,
        "tollgate.provider": scope.provider,
        "tollgate.simulated": scope.simulated,
    }
