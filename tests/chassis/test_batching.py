"""What the batch-while-busy actor promises."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextvars import ContextVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chassis.batching import Batcher
from chassis.errors import Cancelled, Overloaded


class Doubler:
    """Doubles numbers, in batches that it remembers, each when `gate` is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.batches: list[list[int]] = []
        self.running = 0
        self.running_most = 0

    async def run(self, items: list[int]) -> Sequence[int | Exception]:
        self.batches.append(items)
        self.running += 1
        self.running_most = max(self.running_most, self.running)
        await self.gate.wait()
        self.running -= 1
        return [2 * item for item in items]


async def turns() -> None:
    """Let everything that can run do so."""
    for _ in range(10):
        await asyncio.sleep(0)


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.integers(1, 9), max_size=60),
    items_max=st.integers(1, 8),
    weight_max=st.integers(1, 20),
    in_flight=st.integers(1, 4),
    pauses=st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_every_item_is_answered_once_with_its_own_result(
    items: list[int], items_max: int, weight_max: int, in_flight: int, pauses: list[bool]
) -> None:
    """However items arrive, each is run once, in order, in batches within every bound."""

    async def scenario() -> None:
        doubler = Doubler()
        batcher = Batcher(
            doubler.run,
            items_max=items_max,
            weight=lambda item: item,
            weight_max=weight_max,
            in_flight=in_flight,
            waiting_max=100,
        )
        futures = []
        for item, pause in zip(items, pauses, strict=False):
            futures.append(batcher.submit(item))
            if pause:
                await asyncio.sleep(0)
        assert await asyncio.gather(*futures) == [2 * item for item in items]
        assert [item for batch in doubler.batches for item in batch] == items
        assert all(1 <= len(batch) <= items_max for batch in doubler.batches)
        assert all(sum(batch) <= weight_max or len(batch) == 1 for batch in doubler.batches)
        assert doubler.running_most <= in_flight
        await batcher.close()

    asyncio.run(scenario())


@settings(max_examples=40, deadline=None)
@given(leaving=st.lists(st.booleans(), min_size=1, max_size=30), items_max=st.integers(1, 7))
def test_those_who_leave_before_their_batch_are_left_out(
    leaving: list[bool], items_max: int
) -> None:
    """Cancelling a waiting item takes it, and nothing else, out of its batch."""

    async def scenario() -> None:
        doubler = Doubler()
        doubler.gate.clear()
        batcher = Batcher(doubler.run, items_max=items_max, waiting_max=100)
        first = batcher.submit(-1)
        await turns()
        futures = [batcher.submit(item) for item in range(len(leaving))]
        for future, leaves in zip(futures, leaving, strict=True):
            if leaves:
                future.cancel()
        doubler.gate.set()
        stayed = [item for item, leaves in enumerate(leaving) if not leaves]
        assert await asyncio.gather(first, *(futures[item] for item in stayed)) == [
            2 * item for item in (-1, *stayed)
        ]
        await batcher.close()
        assert [item for batch in doubler.batches for item in batch] == [-1, *stayed]

    asyncio.run(scenario())


async def test_what_arrives_while_a_batch_is_in_flight_forms_the_next() -> None:
    """An idle batcher sends at once; a busy one collects."""
    doubler, sizes = Doubler(), list[int]()
    doubler.gate.clear()
    batcher = Batcher(doubler.run, items_max=100, waiting_max=100, on_batch=sizes.append)
    first = batcher.submit(1)
    await turns()
    later = []
    for item in range(2, 7):
        later.append(batcher.submit(item))
        await turns()
    assert doubler.batches == [[1]]
    doubler.gate.set()
    assert await asyncio.gather(first, *later) == [2, 4, 6, 8, 10, 12]
    assert sizes == [1, 5]


async def test_items_of_the_same_turn_travel_together() -> None:
    """Calls that start at the same time share a batch even when nothing is in flight."""
    doubler = Doubler()
    batcher = Batcher(doubler.run, items_max=100, waiting_max=100)
    assert await asyncio.gather(*(batcher.submit(item) for item in range(5))) == [0, 2, 4, 6, 8]
    assert doubler.batches == [[0, 1, 2, 3, 4]]


async def test_leaving_while_in_flight_disturbs_no_other() -> None:
    """A submitter that is cancelled during its batch changes nothing for the rest of it."""
    doubler = Doubler()
    doubler.gate.clear()
    batcher = Batcher(doubler.run, items_max=10, waiting_max=10)

    async def caller(item: int) -> int:
        return await batcher.submit(item)

    tasks = [asyncio.create_task(caller(item)) for item in range(3)]
    await turns()
    tasks[1].cancel()
    await turns()
    doubler.gate.set()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert (outcomes[0], outcomes[2]) == (0, 4)
    assert isinstance(outcomes[1], asyncio.CancelledError)
    assert await batcher.submit(5) == 10


async def test_a_full_queue_refuses_at_once() -> None:
    """Past waiting_max a submit is OVERLOADED, and those who wait are still served."""
    doubler = Doubler()
    doubler.gate.clear()
    batcher = Batcher(doubler.run, items_max=10, waiting_max=2)
    first = batcher.submit(1)
    await turns()
    waiting = [batcher.submit(item) for item in (2, 3)]
    with pytest.raises(Overloaded):
        batcher.submit(4)
    doubler.gate.set()
    assert await asyncio.gather(first, *waiting) == [2, 4, 6]
    assert await batcher.submit(4) == 8


async def test_those_who_left_make_room() -> None:
    """A queue that is full of callers who have gone is not full."""
    doubler = Doubler()
    doubler.gate.clear()
    batcher = Batcher(doubler.run, items_max=10, waiting_max=2)
    first = batcher.submit(1)
    await turns()
    for future in [batcher.submit(item) for item in (2, 3)]:
        future.cancel()
    fourth = batcher.submit(4)
    doubler.gate.set()
    assert await asyncio.gather(first, fourth) == [2, 8]
    assert doubler.batches == [[1], [4]]


async def test_an_exception_of_the_batch_reaches_all_of_it_and_no_more() -> None:
    """When `run` fails every item of the batch fails, and the next batch is served."""

    async def run(items: list[int]) -> list[int]:
        if 0 in items:
            raise ValueError("zero")
        return items

    batcher = Batcher(run, items_max=2, waiting_max=10)
    futures = [batcher.submit(item) for item in (0, 1, 2, 3)]
    outcomes = await asyncio.gather(*futures, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["zero", "zero", "2", "3"]


async def test_an_exception_among_the_results_is_its_items_alone() -> None:
    """A result that is an exception is raised to its own submitter only."""

    async def run(items: list[int]) -> list[int | Exception]:
        return [ValueError("odd") if item % 2 else item for item in items]

    batcher = Batcher(run, items_max=10, waiting_max=10)
    outcomes = await asyncio.gather(*map(batcher.submit, range(4)), return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["0", "odd", "2", "odd"]


async def test_another_number_of_results_is_a_fault_of_the_batch() -> None:
    """Results that cannot be told apart are given to nobody."""

    async def run(items: list[int]) -> list[int]:
        return items[1:]

    batcher = Batcher(run, items_max=10, waiting_max=10)
    outcomes = await asyncio.gather(*map(batcher.submit, range(3)), return_exceptions=True)
    assert all(isinstance(outcome, RuntimeError) for outcome in outcomes)


async def test_a_call_cancelled_inside_the_batch_is_not_its_submitters_end() -> None:
    """A cancelled call within `run` is an error to submitters, and the batcher lives on."""

    async def run(items: list[int]) -> list[int]:
        if 0 in items:
            raise asyncio.CancelledError
        return items

    batcher = Batcher(run, items_max=1, waiting_max=10)
    with pytest.raises(Cancelled):
        await batcher.submit(0)
    assert await batcher.submit(1) == 1


async def test_close_answers_what_is_queued_and_refuses_the_rest() -> None:
    """Closing drains: nothing that was accepted is lost, nothing more is accepted."""
    doubler = Doubler()
    doubler.gate.clear()
    batcher = Batcher(doubler.run, items_max=2, waiting_max=10)
    futures = [batcher.submit(item) for item in range(5)]
    await turns()
    closing = asyncio.create_task(batcher.close())
    await turns()
    assert not closing.done()
    with pytest.raises(Overloaded):
        batcher.submit(9)
    doubler.gate.set()
    await closing
    assert [future.result() for future in futures] == [0, 2, 4, 6, 8]
    await batcher.close()


async def test_an_item_submitted_as_the_last_batch_ends_is_served() -> None:
    """No item is lost between a worker's last look at the queue and its end."""
    doubler = Doubler()
    batcher = Batcher(doubler.run, items_max=10, waiting_max=10)
    first = batcher.submit(1)
    chained: list[asyncio.Future[int]] = []
    first.add_done_callback(lambda _: chained.append(batcher.submit(2)))
    await first
    async with asyncio.timeout(5):
        assert await chained[0] == 4


async def test_a_batch_runs_in_nobodys_context() -> None:
    """A batch does not inherit the context (trace, tenant) of the caller that woke it."""
    caller: ContextVar[str] = ContextVar("caller", default="nobody")
    seen: list[str] = []

    async def run(items: list[int]) -> list[int]:
        seen.append(caller.get())
        return items

    batcher = Batcher(run, items_max=10, waiting_max=10)
    caller.set("acme")
    await batcher.submit(1)
    assert seen == ["nobody"]


@pytest.mark.parametrize("bound", ["items_max", "waiting_max", "in_flight"])
def test_bounds_of_nothing_are_refused(bound: str) -> None:
    """A batcher that could never send anything cannot be made."""
    bounds = {"items_max": 1, "waiting_max": 1, "in_flight": 1} | {bound: 0}
    with pytest.raises(ValueError, match="at least 1"):
        Batcher(Doubler().run, **bounds)  # type: ignore[arg-type]  # all are int


async def test_what_comes_in_a_breath_travels_together() -> None:
    """With a breath the first item leaves at once, and what comes while it lasts is one batch."""
    doubler = Doubler()
    batcher = Batcher(doubler.run, items_max=9, waiting_max=9, breath_s=0.5)
    assert await batcher.submit(1) == 2
    gathered = []
    for item in (2, 3, 4):
        gathered.append(batcher.submit(item))
        await turns()
    assert await asyncio.gather(*gathered) == [4, 6, 8]
    assert doubler.batches == [[1], [2, 3, 4]]
    await batcher.close()
