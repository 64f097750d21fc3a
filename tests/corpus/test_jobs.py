"""A job is done, whatever befalls the worker, the database or the job itself."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from uuid import uuid4

import pytest

from chassis.errors import Internal
from chassis.postgres import Pool, is_database_away, transaction
from services.corpus.core import Ticket
from services.corpus.jobs import SCHEMA, JobQueue, Run, Workers, install
from services.corpus.store import ROLE

TICKET = Ticket("acme", "default", str(uuid4()), 3)

Working = Callable[[Run], AbstractAsyncContextManager[Workers]]


@pytest.fixture
def working(pool: Pool, database_url: str) -> Working:
    """Workers of the job `work`, one at a time, that run what they are given."""

    @asynccontextmanager
    async def start(run: Run) -> AsyncIterator[Workers]:
        workers = Workers(
            run,
            pool=pool,
            url=database_url,
            role=ROLE,
            classes=[{"work": 2}, {"other": 1}],
            heartbeat_timeout_s=1.0,
        )
        workers.start()
        try:
            yield workers
        finally:
            await workers.stop(0.1)

    return start


async def enqueue(pool: Pool, job: str = "work", count: int = 1) -> None:
    async with transaction(pool) as connection:
        for _ in range(count):
            await JobQueue().enqueue(connection, job, TICKET)


async def left(pool: Pool) -> Counter[str]:
    async with transaction(pool) as connection:
        rows = await connection.fetch(f"SELECT status::text FROM {SCHEMA}.pgqueuer")
    return Counter(row["status"] for row in rows)


async def until_done(pool: Pool) -> None:
    """Wait until no job is left, also while the database comes back."""
    async with asyncio.timeout(30):
        for _ in itertools.count():
            try:
                if not await left(pool):
                    return
            except Exception as error:
                if not is_database_away(error):
                    raise
            await asyncio.sleep(0.05)


async def test_installing_again_changes_nothing(pool: Pool, database_url: str) -> None:
    """The queue's schema is installed over itself with its jobs kept, also by several at once."""
    await enqueue(pool)
    await asyncio.gather(*(install(database_url, role=ROLE) for _ in range(3)))
    assert await left(pool) == {"queued": 1}


async def test_a_job_runs_once_with_its_ticket(pool: Pool, working: Working) -> None:
    """Every job of each class is run with what was enqueued, and then it is gone."""
    ran: list[tuple[str, Ticket, int]] = []

    async def run(job: str, ticket: Ticket, attempt: int) -> float | None:
        ran.append((job, ticket, attempt))
        return None

    async with working(run):
        await enqueue(pool, count=20)
        await enqueue(pool, "other")
        await until_done(pool)
    assert Counter(job for job, _, _ in ran) == {"work": 20, "other": 1}
    assert {(ticket, attempt) for _, ticket, attempt in ran} == {(TICKET, 0)}


async def test_an_enqueue_that_is_rolled_back_is_no_job(pool: Pool) -> None:
    """A job exists only if the transaction that enqueued it commits."""

    async def give_up() -> None:
        async with transaction(pool) as connection:
            await JobQueue().enqueue(connection, "work", TICKET)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await give_up()
    assert not await left(pool)


async def test_a_job_asks_to_be_run_again(pool: Pool, working: Working) -> None:
    """A job that answers a delay is run again with its attempts counted; one that raises, too."""
    attempts: list[int] = []

    async def run(_job: str, _ticket: Ticket, attempt: int) -> float | None:
        attempts.append(attempt)
        if attempt == 0:
            return 0.0
        if attempt == 1:
            raise Internal()
        return None

    async with working(run):
        await enqueue(pool)
        await until_done(pool)
    assert attempts == [0, 1, 2]


async def test_no_more_run_at_once_than_allowed(pool: Pool, working: Working) -> None:
    """A class of two never has three jobs running."""
    running, most = 0, 0

    async def run(_job: str, _ticket: Ticket, _attempt: int) -> float | None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.02)
        running -= 1
        return None

    async with working(run):
        await enqueue(pool, count=12)
        await until_done(pool)
    assert most == 2


async def test_stopping_puts_back_what_does_not_end(pool: Pool, working: Working) -> None:
    """A job that outlasts the grace is cancelled, its row stays, and the next worker runs it."""
    begun = asyncio.Event()

    async def hang(_job: str, _ticket: Ticket, _attempt: int) -> float | None:
        begun.set()
        await asyncio.Event().wait()
        return None

    async def run(_job: str, _ticket: Ticket, _attempt: int) -> float | None:
        return None

    async with working(hang):
        await enqueue(pool)
        await asyncio.wait_for(begun.wait(), 10)
    assert await left(pool) == {"queued": 1}
    async with working(run):
        await until_done(pool)


async def test_a_dead_workers_job_is_taken_over(pool: Pool, working: Working) -> None:
    """A job whose worker fell silent is run by another."""
    ran = asyncio.Event()

    async def run(_job: str, _ticket: Ticket, _attempt: int) -> float | None:
        ran.set()
        return None

    await enqueue(pool)
    async with transaction(pool) as connection:
        await connection.execute(
            f"UPDATE {SCHEMA}.pgqueuer SET status = 'picked', queue_manager_id = $1, "
            "heartbeat = now() - interval '1 minute', execute_after = now() - interval '1 minute'",
            uuid4(),
        )
    async with working(run):
        await until_done(pool)
    assert ran.is_set()


async def test_what_the_queue_gave_up_on_is_put_back(pool: Pool, working: Working) -> None:
    """A job held as failed is run after all: only the job itself says when it is over."""

    async def run(_job: str, _ticket: Ticket, _attempt: int) -> float | None:
        return None

    await enqueue(pool)
    async with transaction(pool) as connection:
        await connection.execute(f"UPDATE {SCHEMA}.pgqueuer SET status = 'failed'")
    async with working(run):
        await until_done(pool)


@pytest.mark.parametrize("while_running", [False, True])
async def test_a_lost_database_is_found_again(
    pool: Pool,
    working: Working,
    cut_all: Callable[[], Awaitable[None]],
    while_running: bool,
) -> None:
    """Jobs go on after every connection was cut, whether one was running or none."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def run(_job: str, _ticket: Ticket, _attempt: int) -> float | None:
        begun.set()
        await go_on.wait()
        return None

    async with working(run):
        if while_running:
            await enqueue(pool, count=3)
            await asyncio.wait_for(begun.wait(), 10)
        await cut_all()
        go_on.set()
        await until_done(pool)
        await enqueue(pool)
        await until_done(pool)
