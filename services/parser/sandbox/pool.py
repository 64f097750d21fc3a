"""The pool: warm workers, one document each at a time, thrown away at the first sign of trouble.

Every slot has a keeper, a task that hires a worker, hands it jobs from one queue, and replaces it
when it is worn out, failed, or its job was given up. A job's answers go through a bounded queue,
so a reader that is slow holds up its own document only, and one that stalls loses it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import sys
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from chassis.errors import (
    DeadlineExceeded,
    DocumentUnreadable,
    Overloaded,
    ProviderUnavailable,
    TollgateError,
    Violation,
)
from services.parser.sandbox.frames import (
    HEAD,
    SIZE,
    Frame,
    FrameError,
    Kind,
    decode_body,
    decode_head,
    encode,
)
from services.parser.sandbox.worker import WorkerBounds

log = logging.getLogger(__name__)

BOOT = (
    "import sys; sys.path.extend(sys.argv[2:]); "
    "from services.parser.sandbox.worker import run; run()"
)
LIBRARIES = ("services", "chassis", "liteparse", "anydoc", "html_to_markdown")

START_TIMEOUT_S = 20.0
RESTART_WAIT_S = 1.0
EXIT_WAIT_S = 2.0
DISCARD_BYTES = 1024 * 1024
ANSWERS_AHEAD = 8
"""How many pages a worker may be ahead of the reader."""

_ABORTED = {signal.SIGABRT, signal.SIGTRAP, signal.SIGILL}
"""How Rust's and PDFium's allocators end a process that has no memory left."""


@dataclass(frozen=True, slots=True)
class PoolBounds:
    """What the pool and a document may use.

    `document_timeout_s` counts the time in which the worker is waited for, `stall_timeout_s` the
    time in which a page waits for its reader. Workers are replaced after `documents_per_worker`
    documents or above `resident_bytes_max` of resident memory.
    """

    workers: int
    waiting_max: int
    document_timeout_s: float
    stall_timeout_s: float
    memory_bytes: int
    resident_bytes_max: int
    documents_per_worker: int
    document_bytes_max: int
    answer_bytes_max: int


@dataclass(frozen=True, slots=True)
class Request:
    """What a worker is asked: PARSE or INSPECT a document, with what the caller said of it."""

    kind: Kind
    content: bytes
    media_type: str = ""
    file_name: str = ""
    max_pages: int = 0


def died(cause: str) -> DocumentUnreadable:
    """The error for a document whose worker did not live to answer: memory, timeout or crash."""
    words = {
        "memory": "reading the document takes more memory than a document may use",
        "timeout": "reading the document takes longer than a document may take",
        "crash": "the parser broke off on the document",
    }
    return DocumentUnreadable(
        words[cause],
        violations=[Violation("document", words[cause])],
        metadata={"cause": cause},
    )


class _Job:
    """A request, its answers, and whether anyone still waits for them."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.answers: asyncio.Queue[Frame | TollgateError] = asyncio.Queue(ANSWERS_AHEAD)
        self.work: asyncio.Task[None] | None = None
        self.given_up = False

    def give_up(self) -> None:
        self.given_up = True
        if self.work is not None:
            self.work.cancel()

    def fail(self, error: TollgateError) -> None:
        """Put the error last, in the place of an answer that nobody took if need be."""
        if self.answers.full():
            self.answers.get_nowait()
        self.answers.put_nowait(error)


class Pool:
    """Workers that read documents. `start` it, `answers` to a request are frames, `stop` it."""

    def __init__(self, bounds: PoolBounds) -> None:
        self._bounds = bounds
        self._waiting: deque[_Job] = deque()
        self._wake = asyncio.Condition()
        self._keepers: list[asyncio.Task[None]] = []
        self._workers: set[_Worker] = set()
        self._starved = False

    @property
    def healthy(self) -> bool:
        """Whether workers can be had."""
        return bool(self._keepers) and not self._starved

    def pids(self) -> list[int]:
        """The process ids of the workers, oldest first."""
        return sorted(worker.pid for worker in self._workers if worker.alive)

    async def start(self) -> None:
        """Start the keepers and wait until each has a worker, or raise ProviderUnavailable."""
        ready = [asyncio.get_running_loop().create_future() for _ in range(self._bounds.workers)]
        self._keepers = [asyncio.create_task(self._keep(mark)) for mark in ready]
        try:
            await asyncio.gather(*ready)
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End every worker; jobs that still wait are answered with an error."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        self._keepers.clear()
        self._refuse_waiting()

    async def answers(self, request: Request) -> AsyncGenerator[Frame, None]:
        """The worker's frames: OPENED, then pages, then DONE; or LOCKED; or FAILED.

        Closing the generator ends the work at once and costs the pool that worker.
        Raises Overloaded, ProviderUnavailable, DocumentUnreadable (memory, timeout, crash).
        """
        if len(self._waiting) >= self._bounds.waiting_max:
            raise Overloaded("too many documents are waiting to be parsed")
        job = _Job(request)
        self._waiting.append(job)
        try:
            async with self._wake:
                self._wake.notify()
            while True:
                answer = await job.answers.get()
                if isinstance(answer, TollgateError):
                    raise answer
                yield answer
                if answer.kind in (Kind.DONE, Kind.LOCKED, Kind.FAILED):
                    return
        finally:
            job.give_up()
            with contextlib.suppress(ValueError):
                self._waiting.remove(job)

    async def _keep(self, ready: asyncio.Future[None]) -> None:
        """Keep one slot filled, for ever."""
        while True:
            try:
                worker = await _Worker.hire(self._bounds)
            except ProviderUnavailable as error:
                if not ready.done():
                    ready.set_exception(error)
                self._starved = not self._workers
                self._refuse_waiting()
                await asyncio.sleep(RESTART_WAIT_S)
                continue
            self._workers.add(worker)
            self._starved = False
            if not ready.done():
                ready.set_result(None)
            try:
                await self._employ(worker)
            finally:
                self._workers.discard(worker)
                await worker.dismiss()

    async def _employ(self, worker: _Worker) -> None:
        """Hand jobs to the worker until it has to go."""
        while not worker.worn_out:
            job = await self._next_job()
            if not worker.alive:
                self._waiting.appendleft(job)
                return
            job.work = asyncio.create_task(worker.serve(job))
            try:
                await asyncio.wait({job.work})
            finally:
                job.work.cancel()
            if job.work.cancelled() or job.work.exception() is not None:
                return

    async def _next_job(self) -> _Job:
        async with self._wake:
            await self._wake.wait_for(lambda: self._waiting)
            return self._waiting.popleft()

    def _refuse_waiting(self) -> None:
        if any(worker.alive for worker in self._workers):
            return
        while self._waiting:
            self._waiting.popleft().fail(ProviderUnavailable("the parser has no worker"))


class _Worker:
    """One worker process, from its start to its end."""

    def __init__(self, process: asyncio.subprocess.Process, bounds: PoolBounds) -> None:
        self._process = process
        self._bounds = bounds
        self._documents = 0

    @classmethod
    async def hire(cls, bounds: PoolBounds) -> _Worker:
        """Start a worker and wait until it has confined itself. Raises ProviderUnavailable."""
        limits = WorkerBounds(
            memory_bytes=bounds.memory_bytes,
            document_bytes_max=bounds.document_bytes_max,
            cpu_s=math.ceil(bounds.document_timeout_s),
        )
        spawning = asyncio.create_task(_spawn(limits))
        try:
            process = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            # A process half spawned would outlive the pool: let it come, then end it.
            await cls(await spawning, bounds).dismiss()
            raise
        worker = cls(process, bounds)
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                frame = await worker._frame()
            if frame.kind is not Kind.READY:
                raise FrameError("no greeting")
        except (TimeoutError, FrameError, asyncio.IncompleteReadError, OSError):
            await worker.dismiss()
            log.error("parser worker did not start", extra={"fields": {"exit": process.returncode}})
            raise ProviderUnavailable("a parser worker could not be started") from None
        except BaseException:
            await worker.dismiss()
            raise
        return worker

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process has not ended. Asks the system, which knows before asyncio does."""
        if self._process.returncode is not None:
            return False
        try:
            return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    @property
    def worn_out(self) -> bool:
        """Whether it has read its share of documents or keeps too much memory."""
        return (
            self._documents >= self._bounds.documents_per_worker
            or resident_bytes(self.pid) > self._bounds.resident_bytes_max
        )

    async def serve(self, job: _Job) -> None:
        """Answer the job. Raises after telling the job's reader, when the worker must go."""
        self._documents += 1
        try:
            await self._serve(job)
        except DeadlineExceeded as error:
            job.fail(error)
            raise
        except TimeoutError:
            job.fail(died("timeout"))
            raise
        except FrameError:
            job.fail(died("crash"))
            raise
        except (asyncio.IncompleteReadError, OSError):
            job.fail(died(await self._cause()))
            raise
        except asyncio.CancelledError:
            job.fail(ProviderUnavailable("the parser is stopping"))
            raise
        except Exception:
            job.fail(died("crash"))
            raise

    async def _serve(self, job: _Job) -> None:
        clock = asyncio.get_running_loop().time
        left_s = self._bounds.document_timeout_s
        asked = clock()
        async with asyncio.timeout(left_s):
            await self._ask(job.request)
        left_s -= clock() - asked
        check = _Order(job.request.kind, self._bounds.answer_bytes_max)
        while not check.ended:
            asked = clock()
            async with asyncio.timeout(left_s):
                frame = await self._frame()
            left_s -= clock() - asked
            check.take(frame)
            await self._hand_over(job, frame)

    async def _hand_over(self, job: _Job, frame: Frame) -> None:
        try:
            async with asyncio.timeout(self._bounds.stall_timeout_s):
                await job.answers.put(frame)
        except TimeoutError:
            raise DeadlineExceeded("the pages were not taken in time") from None

    async def _ask(self, request: Request) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        names = request.media_type[:200], request.file_name[-200:]
        stdin.write(encode(Frame(request.kind, request.max_pages, *names)))
        stdin.write(SIZE.pack(len(request.content)))
        stdin.write(request.content)
        await stdin.drain()

    async def _frame(self) -> Frame:
        stdout = self._process.stdout
        assert stdout is not None
        head = decode_head(await stdout.readexactly(HEAD.size))
        return decode_body(head, await stdout.readexactly(head.body_bytes))

    async def _cause(self) -> str:
        """Why the worker has ended: told from how it ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(EXIT_WAIT_S):
                await self._process.wait()
        ended_by = -(self._process.returncode or 0)
        if ended_by in _ABORTED:
            return "memory"
        return "timeout" if ended_by == signal.SIGXCPU else "crash"

    async def dismiss(self) -> None:
        """Kill the process and wait for its end."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        # asyncio takes a process for ended only once its output has been read.
        assert self._process.stdout is not None
        while await self._process.stdout.read(DISCARD_BYTES):
            pass
        await self._process.wait()


async def _spawn(limits: WorkerBounds) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-I", "-S", "-B", "-c", BOOT, limits.to_json(), *_library_paths()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env={},
            cwd="/",
            start_new_session=True,
        )
    except OSError:
        log.exception("parser worker could not be spawned")
        raise ProviderUnavailable("a parser worker could not be started") from None


class _Order:
    """The order that a worker's answers must have; anything else is a FrameError."""

    def __init__(self, asked: Kind, bytes_max: int) -> None:
        self._asked = asked
        self._bytes_left = bytes_max
        self._pages_left: int | None = None
        self._next_page = 1
        self.ended = False

    def take(self, frame: Frame) -> None:
        """Check the next frame."""
        self._bytes_left -= len(frame.first) + len(frame.second)
        if self._bytes_left < 0:
            raise FrameError("more than an answer may hold")
        if frame.kind is Kind.PAGE:
            if frame.number != self._next_page or not self._pages_left:
                raise FrameError("page out of order")
            self._next_page += 1
            self._pages_left -= 1
        elif frame.kind is Kind.OPENED and self._pages_left is None:
            self._pages_left = frame.number if self._asked is Kind.PARSE else 0
        elif frame.kind in (Kind.LOCKED, Kind.FAILED) or (
            frame.kind is Kind.DONE and self._pages_left == 0
        ):
            self.ended = True
        else:
            raise FrameError("frame out of order")


def resident_bytes(pid: int) -> int:
    """The resident memory of a process; 0 where that cannot be read."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def _library_paths() -> list[str]:
    """The directories that hold what a worker imports: all that its path will have.

    Raises ProviderUnavailable where one of them is not installed.
    """
    paths: dict[str, None] = {}
    for name in LIBRARIES:
        spec = find_spec(name)
        if spec is None:
            raise ProviderUnavailable(
                f"the library {name} is not installed; run `make clean` and try again"
            )
        for location in spec.submodule_search_locations or []:
            paths[str(Path(location).parent)] = None
    return list(paths)
