"""Work that must not be lost when the caller goes away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from contextvars import copy_context
from typing import Any, TypeVar

from chassis.call import set_time_left

T = TypeVar("T")

log = logging.getLogger(__name__)

# asyncio keeps only a weak reference to a task, so one that nobody awaits could vanish.
_running: set[asyncio.Task[Any]] = set()


def finish(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start work that survives the cancellation of whoever started it.

    Awaiting the task directly passes a cancellation on to it; await `asyncio.shield(task)` to wait
    without that. A failure that nobody awaits is logged. `drain` waits for what is left.
    """
    context = copy_context()
    context.run(set_time_left, None)  # The caller's deadline is not the work's.
    task = asyncio.create_task(work, context=context)
    _running.add(task)
    task.add_done_callback(_done)
    return task


def _done(task: asyncio.Task[Any]) -> None:
    _running.discard(task)
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("work in the background failed", exc_info=error)


async def drain(timeout_s: float) -> int:
    """Wait for everything that `finish` started. Returns how much was left undone."""
    loop = asyncio.get_running_loop()
    mine = {task for task in _running if task.get_loop() is loop}
    if not mine:
        return 0
    _, left = await asyncio.wait(mine, timeout=timeout_s)
    return len(left)
