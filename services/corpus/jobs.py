"""Durable jobs on PgQueuer: enqueued in the transaction of whoever enqueues, run until they end.

A job lives as a row. Whatever befalls its worker, the row stays: a worker that dies is replaced
once its heartbeat is old, a database that goes away is dialled again, and a job that PgQueuer gave
up on (it fails only where the database did) is put back. Only `run` decides that a job is over.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from datetime import timedelta
from functools import cache
from typing import Any

import asyncpg
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.adapters.persistence.qb import (
    QueryBuilderEnvironment,
    QueryQueueBuilder,
    QuerySchedulerBuilder,
)
from pgqueuer.adapters.persistence.queries import Queries
from pgqueuer.core.qm import QueueManager
from pgqueuer.domain.errors import RetryRequested
from pgqueuer.domain.models import Job
from pgqueuer.domain.settings import DBSettings
from pgqueuer.domain.types import Channel

from chassis.postgres import Connection, Pool, is_database_away, transaction
from services.corpus.core import Ticket, backoff_s

log = logging.getLogger(__name__)

SCHEMA = "corpus_jobs"
CHANNEL = Channel("tollgate_corpus_jobs")

# A job's attempt: in how many seconds to try again, or None when the job is over.
Run = Callable[[str, Ticket, int], Awaitable[float | None]]

_DEQUEUE_TIMEOUT = timedelta(seconds=1)
_BATCH = 8
_RECONNECT_MAX_S = 2.0
# A queue that worked this long was well, whatever ended it.
_STEADY_S = 5.0
_TEND_S = 2.0
_PRUNE_S = 60.0
_LOG_KEPT = timedelta(days=1)


@cache
def _builders() -> tuple[QueryBuilderEnvironment, QueryQueueBuilder, QuerySchedulerBuilder]:
    """What writes the queue's SQL. Made once: reading its settings takes milliseconds."""
    settings = DBSettings(db_schema=SCHEMA, channel=CHANNEL)
    return (
        QueryBuilderEnvironment(settings),
        QueryQueueBuilder(settings),
        QuerySchedulerBuilder(settings),
    )


def _queries(connection: Any) -> Queries:
    return Queries(AsyncpgDriver(connection), *_builders())


async def install(url: str, *, role: str) -> None:
    """Bring the queue's schema up to date and let the role work with it. Safe to repeat.

    `url` leads to the database itself, as a user who may create schemas.
    """
    connection = await asyncpg.connect(url)
    try:
        await connection.execute(
            "SELECT pg_advisory_lock(hashtextextended('tollgate.corpus.jobs', 0))"
        )
        queries = _queries(connection)
        if await queries.schema_is_installed():
            await queries.upgrade()
        else:
            async with connection.transaction():
                await queries.install()
        await connection.execute(
            f"""GRANT USAGE ON SCHEMA {SCHEMA} TO {role};
                GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {SCHEMA} TO {role};
                GRANT USAGE ON ALL SEQUENCES IN SCHEMA {SCHEMA} TO {role};"""
        )
    finally:
        await connection.close()


class JobQueue:
    """Where jobs are put."""

    async def enqueue(
        self, connection: Connection, job: str, ticket: Ticket, *, after_s: float = 0.0
    ) -> None:
        """Enqueue a job in the transaction under way; it exists if that commits."""
        await _queries(connection).enqueue(
            job,
            json.dumps(asdict(ticket)).encode(),
            execute_after=timedelta(seconds=after_s) if after_s else None,
        )


class Workers:
    """Runs jobs. Each of `classes` says of some jobs how many may run at once in this process.

    A class is dequeued on its own, so that its backlog does not hold up another's.
    """

    def __init__(
        self,
        run: Run,
        *,
        pool: Pool,
        url: str,
        role: str,
        classes: Sequence[Mapping[str, int]],
        heartbeat_timeout_s: float,
    ) -> None:
        self._run = run
        self._pool = pool
        self._url = url
        self._role = role
        self._classes = classes
        self._heartbeat_timeout = timedelta(seconds=heartbeat_timeout_s)
        self._stopping = asyncio.Event()
        self._shutdowns: set[asyncio.Event] = set()
        self._loops: list[asyncio.Task[None]] = []
        self._running: set[asyncio.Task[float | None]] = set()

    def start(self) -> None:
        """Begin to work."""
        self._loops = [asyncio.create_task(self._serve(limits)) for limits in self._classes]
        self._loops.append(asyncio.create_task(self._tend()))

    async def stop(self, grace_s: float) -> None:
        """Take no more jobs, let those under way end, and put back the ones that do not."""
        self._stopping.set()
        for shutdown in self._shutdowns:
            shutdown.set()
        if self._running:
            await asyncio.wait(self._running, timeout=grace_s)
        # What is cancelled here, and not by PgQueuer, is asked to be retried: its row stays.
        for task in self._running:
            task.cancel()
        if self._loops:
            _, late = await asyncio.wait(self._loops, timeout=5.0)
            for loop in late:
                loop.cancel()

    async def _serve(self, limits: Mapping[str, int]) -> None:
        """Work through one class of jobs, dialling the database again whenever it went away."""
        slots = {str(job): asyncio.Semaphore(limit) for job, limit in limits.items()}
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                await self._work_off(slots, sum(limits.values()))
            except Exception as error:
                log.warning(
                    "the job queue was interrupted",
                    exc_info=error,
                    extra={"fields": {"jobs": list(slots)}},
                )
            failures = 0 if time.monotonic() - began > _STEADY_S else failures + 1
            await self._pause(backoff_s(failures, most_s=_RECONNECT_MAX_S))

    async def _work_off(self, slots: Mapping[str, asyncio.Semaphore], at_once: int) -> None:
        connection = await asyncpg.connect(
            self._url,
            timeout=5.0,
            command_timeout=10.0,
            server_settings={"role": self._role, "application_name": "tollgate-corpus-jobs"},
        )
        dequeuing = QueueManager(_queries(connection), CHANNEL)
        for job, slot in slots.items():
            dequeuing.entrypoint(job, on_failure="hold")(self._entrypoint(slot))
        self._shutdowns.add(dequeuing.shutdown)
        try:
            if self._stopping.is_set():
                return
            await dequeuing.run(
                dequeue_timeout=_DEQUEUE_TIMEOUT,
                batch_size=_BATCH,
                # More than run at once: what comes next is at hand when a slot gets free.
                max_concurrent_tasks=max(2 * _BATCH, 2 * at_once),
                shutdown_on_listener_failure=True,
                heartbeat_timeout=self._heartbeat_timeout,
                log_aggregation_interval=timedelta(0),
            )
        finally:
            self._shutdowns.discard(dequeuing.shutdown)
            connection.terminate()

    def _entrypoint(self, slot: asyncio.Semaphore) -> Callable[[Job], Awaitable[None]]:
        async def execute(job: Job) -> None:
            await self._execute(job, slot)

        return execute

    async def _execute(self, job: Job, slot: asyncio.Semaphore) -> None:
        """Run one job. The only thing that leaves here is the wish to be run again."""
        task = asyncio.create_task(self._attempt(job, slot))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        try:
            delay_s = await task
        except asyncio.CancelledError:
            # PgQueuer deletes the row of a job that ends cancelled.
            task.cancel()
            delay_s = 0.0
        if delay_s is not None:
            raise RetryRequested(timedelta(seconds=delay_s)) from None

    async def _attempt(self, job: Job, slot: asyncio.Semaphore) -> float | None:
        async with slot:
            try:
                ticket = Ticket(**json.loads(job.payload or b"{}"))
                return await self._run(str(job.entrypoint), ticket, job.attempts)
            except Exception:
                log.exception("job failed unexpectedly", extra={"fields": {"job": job.entrypoint}})
                return backoff_s(job.attempts)

    async def _tend(self) -> None:
        """Put back what PgQueuer gave up on, and drop old lines of its log."""
        pruned = 0.0
        while not self._stopping.is_set():
            prune = time.monotonic() - pruned > _PRUNE_S
            try:
                async with transaction(self._pool) as connection:
                    await _put_back(connection)
                    if prune:
                        await _prune(connection)
                        pruned = time.monotonic()
            except Exception as error:
                if not is_database_away(error):
                    log.exception("cannot tend to the job queue")
            await self._pause(_TEND_S)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


async def _put_back(connection: Connection) -> None:
    queries = _queries(connection)
    held = await queries.list_failed_jobs()
    if held:
        await queries.requeue_jobs([job.id for job in held])


async def _prune(connection: Connection) -> None:
    log_table = _builders()[0].settings.qualified.queue_table_log
    await connection.execute(
        f"""DELETE FROM {log_table} WHERE id IN (
              SELECT id FROM {log_table} WHERE created < now() - $1::interval
              ORDER BY created LIMIT 10000)""",
        _LOG_KEPT,
    )
