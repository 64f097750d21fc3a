"""The worker process: gives up what it does not need, then reads documents one after another.

Started by the pool as `python -I -S -B -c BOOT <bounds as JSON> <paths…>` with an empty
environment; requests come on stdin, answers go to stdout, both as `frames`.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from typing import BinaryIO

from services.parser.sandbox.frames import (
    HEAD,
    SIZE,
    Fault,
    Frame,
    Head,
    Kind,
    decode_body,
    decode_head,
    encode,
)

COPIES_OF_DOCUMENT = 3
"""How many copies of a document fit beside the worker's own memory."""

OPEN_FILES_MAX = 16
NOBODY = 65534

_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38
_CLONE_NEWUSER = 0x10000000
_CLONE_NEWNET = 0x40000000


@dataclass(frozen=True, slots=True)
class WorkerBounds:
    """What a worker may use: address space beside its document, a document's size, CPU time."""

    memory_bytes: int
    document_bytes_max: int
    cpu_s: int

    def to_json(self) -> str:
        """For the worker's command line."""
        return json.dumps(asdict(self))


def run() -> None:
    """The worker's life: confine, load, confine further, serve until stdin ends."""
    bounds = WorkerBounds(**json.loads(sys.argv[1]))
    answers = _own_stdout()
    _confine(bounds)
    from services.parser.sandbox import readers

    readers.warm_up()
    _drop_privileges()
    requests = sys.stdin.buffer
    _say(answers, Frame(Kind.READY))
    while head := requests.read(HEAD.size):
        _serve(bounds, decode_head(head), requests, answers)


def _own_stdout() -> BinaryIO:
    """The pipe to the pool, out of reach of whatever prints."""
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)
    return answers


def _confine(bounds: WorkerBounds) -> None:
    """Set the limits that loading libraries can live with, before anything else happens."""
    most = bounds.memory_bytes + COPIES_OF_DOCUMENT * bounds.document_bytes_max
    resource.setrlimit(resource.RLIMIT_AS, (bounds.memory_bytes, most))
    resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES_MAX, OPEN_FILES_MAX))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        # No network. Root needs no user namespace for it; where neither is allowed, go on.
        if libc.unshare(_CLONE_NEWNET) != 0:
            libc.unshare(_CLONE_NEWUSER | _CLONE_NEWNET)


def _drop_privileges() -> None:
    """With everything loaded: nobody's rights, no new ones, and no further process or thread."""
    if os.getuid() == 0:
        # Root of a container may lack the right to become another: then it stays what it is.
        with contextlib.suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # Changing the user cleared it.
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _allow(bounds: WorkerBounds, document_bytes: int) -> None:
    """Memory and CPU time for one more document."""
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = bounds.memory_bytes + COPIES_OF_DOCUMENT * document_bytes
    resource.setrlimit(resource.RLIMIT_AS, (min(memory, most), most))
    cpu = int(time.process_time()) + 1 + bounds.cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, resource.RLIM_INFINITY))


def _serve(bounds: WorkerBounds, head: Head, requests: BinaryIO, answers: BinaryIO) -> None:
    """Read one request and answer it."""
    request = decode_body(head, requests.read(head.body_bytes))
    (size,) = SIZE.unpack(requests.read(SIZE.size))
    if size > bounds.document_bytes_max:
        raise ValueError("document larger than agreed")
    _allow(bounds, size)
    content = requests.read(size)
    if len(content) == size:
        _answer(request, content, answers)


def _answer(request: Frame, content: bytes, answers: BinaryIO) -> None:
    from services.parser.sandbox import readers

    try:
        _answer_pages(request, content, answers)
    except readers.Unreadable as error:
        _say(answers, Frame(Kind.FAILED, error.count, error.fault, error.media_type))
    except readers.Locked as error:
        _say(answers, Frame(Kind.LOCKED, 0, error.media_type))
    except MemoryError:
        _say(answers, Frame(Kind.FAILED, 0, Fault.MEMORY))
    except BrokenPipeError:
        raise
    except BaseException:
        # A Rust panic is a BaseException; whatever a parser throws is about the document.
        _say(answers, Frame(Kind.FAILED, 0, Fault.MALFORMED))


def _answer_pages(request: Frame, content: bytes, answers: BinaryIO) -> None:
    from services.parser.sandbox import readers

    opened = readers.open_document(content, request.first, request.second)
    if request.kind is Kind.PARSE and 0 < request.number < opened.pages:
        raise readers.Unreadable(Fault.TOO_MANY_PAGES, opened.media_type, opened.pages)
    _say(answers, Frame(Kind.OPENED, opened.pages, opened.media_type))
    if request.kind is Kind.PARSE:
        for number, sheet in enumerate(opened.sheets, 1):
            _say(answers, Frame(Kind.PAGE, number, sheet.markdown, sheet.text))
    _say(answers, Frame(Kind.DONE))


def _say(answers: BinaryIO, frame: Frame) -> None:
    answers.write(encode(frame))
    answers.flush()
