"""The batch-while-busy actor: whatever arrives while a batch is in flight forms the next one.

There are no timers. An idle batcher sends at once (items submitted in the same turn of the event
loop travel together), a busy one collects; so latency is not traded for size, and size grows with
load by itself. The ledger, the router and the embedder stand on this.
"""

from __future__ import annotations

import asyncio
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import copy_context
from typing import Generic, TypeAlias, TypeVar

from chassis.errors import Cancelled, Overloaded

Item = TypeVar("Item")
Result = TypeVar("Result")

# An item, the future its submitter waits on, and its weight.
_Entry: TypeAlias = tuple[Item, asyncio.Future[Result], int]


class Batcher(Generic[Item, Result]):
    """Answers single items through `run`, which takes lists of them.

    `run(items)` answers one result per item, in order; a result that is an Exception is raised to
    its own submitter alone, while an exception raised by `run` reaches every item of that batch.
    A batch holds at most `items_max` items weighing at most `weight_max` together; an item that is
    heavier than that travels alone. At most `in_flight` batches run at a time, and at most
    `waiting_max` items wait. `on_batch(size)` is told of every batch before it runs.

    A batch belongs to no single caller, so it runs in a copy of the context in which the batcher
    was made, not in that of whoever happened to wake it. One batcher serves one event loop.

    With `breath_s` a worker that has answered a batch waits so long before it takes the next, so
    that under load batches are fewer and larger; an idle batcher still sends at once.
    """

    def __init__(
        self,
        run: Callable[[list[Item]], Awaitable[Sequence[Result | Exception]]],
        *,
        items_max: int,
        waiting_max: int,
        weight: Callable[[Item], int] | None = None,
        weight_max: int | None = None,
        in_flight: int = 1,
        breath_s: float = 0.0,
        on_batch: Callable[[int], None] | None = None,
    ) -> None:
        if min(items_max, waiting_max, in_flight) < 1:
            raise ValueError("items_max, waiting_max and in_flight must be at least 1")
        if weight_max is not None and weight is None:
            raise ValueError("weight_max needs a weight")
        self._run = run
        self._items_max = items_max
        self._waiting_max = waiting_max
        self._weight = None if weight_max is None else weight
        self._weight_max = sys.maxsize if weight_max is None else weight_max
        self._in_flight = in_flight
        self._breath_s = breath_s
        self._on_batch = on_batch
        self._context = copy_context()
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._running = 0
        self._waking = False
        self._purged = False
        self._closed = False
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """How many items wait for a batch; those of submitters that left are still among them."""
        return len(self._waiting)

    def submit(self, item: Item) -> asyncio.Future[Result]:
        """Queue one item and answer the future of its result: `await batcher.submit(item)`.

        Cancelling the wait before the item's batch left takes it out of that batch; later, it
        disturbs nothing. Raises Overloaded, at once, when `waiting_max` items wait or after close.
        """
        if self._closed:
            raise Overloaded("shutting down")
        if len(self._waiting) >= self._waiting_max and not self._purge():
            raise Overloaded("too many calls are waiting")
        weight = 0 if self._weight is None else self._weight(item)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()
        self._waiting.append((item, future, weight))
        self._wake(loop)
        return future

    async def close(self) -> None:
        """Refuse further items, and return when all that were queued have been answered."""
        self._closed = True
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _wake(self, loop: asyncio.AbstractEventLoop) -> None:
        """Start one more worker if one may run and none is about to start."""
        if self._waking or self._running >= self._in_flight:
            return
        self._waking = True
        self._running += 1
        task = loop.create_task(self._work(loop), context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        """Send batches, one after the other, until nothing waits."""
        self._waking = False
        try:
            while self._waiting:
                batch = self._cut()
                if self._waiting:
                    self._wake(loop)
                if batch:
                    await self._answer(batch)
                    if self._breath_s and not self._closed:
                        await asyncio.sleep(self._breath_s)
        finally:
            # Not left to the task's callback, which comes a turn later: an item submitted in
            # between would see a worker that is no more, and wait for ever.
            self._running -= 1

    def _cut(self) -> list[_Entry[Item, Result]]:
        """Take the next batch off the queue, leaving out those whose submitter has gone."""
        self._purged = False
        waiting, items_max, room = self._waiting, self._items_max, self._weight_max
        batch: list[_Entry[Item, Result]] = []
        while waiting and len(batch) < items_max:
            entry = waiting[0]
            if not entry[1].done():
                if batch and entry[2] > room:
                    break
                room -= entry[2]
                batch.append(entry)
            waiting.popleft()
        return batch

    async def _answer(self, batch: list[_Entry[Item, Result]]) -> None:
        """Run one batch and give every submitter that still waits its own outcome."""
        try:
            if self._on_batch is not None:
                self._on_batch(len(batch))
            results = await self._run([item for item, _, _ in batch])
            if len(results) != len(batch):
                raise RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                for _, future, _ in batch:
                    future.cancel()
                raise
            # A call inside the batch was cancelled, not the submitters' own tasks.
            _refuse(batch, Cancelled("the batch was cancelled"))
        except Exception as error:
            _refuse(batch, error)
        else:
            for (_, future, _), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _purge(self) -> bool:
        """Drop the items of submitters that left; whether there is room now.

        It scans the queue, so it does so at most once between two batches.
        """
        if not self._purged:
            self._purged = True
            self._waiting = deque(entry for entry in self._waiting if not entry[1].done())
        return len(self._waiting) < self._waiting_max


def _refuse(batch: list[_Entry[Item, Result]], error: Exception) -> None:
    for _, future, _ in batch:
        if not future.done():
            future.set_exception(error)
