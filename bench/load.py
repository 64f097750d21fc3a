"""Closed-loop load in a process of its own: so many calls in flight for so long, every one checked.

    python -m bench.load '{"address": …, "method": …, "request_hex": …, "metadata": …,
                           "in_flight": 64, "seconds": 4}'

Prints one JSON object: calls sent, calls answered OK, and calls per second, p50 and p99 in
milliseconds after the warm-up. The load is h2load's where that is installed (Debian's package
nghttp2-client), which takes little of the processors away from what is measured; else our own.
"""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from math import ceil
from pathlib import Path
from shutil import which
from typing import Any

import grpc
import uvloop

WARM_UP_S = 0.7
_CHANNELS = 2
_FRAME_BYTES = 5


async def load(plan: dict[str, Any]) -> dict[str, Any]:
    """Run one plan."""
    # Two connections at the most: one caller with many calls, not many callers.
    channels = [
        grpc.aio.insecure_channel(plan["address"], options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(min(_CHANNELS, plan["in_flight"]))
    ]
    await asyncio.gather(*(channel.channel_ready() for channel in channels))
    request, metadata = bytes.fromhex(plan["request_hex"]), list(plan["metadata"].items())
    started = time.perf_counter()
    measured_from = started + WARM_UP_S
    ends = measured_from + plan["seconds"]
    sent = 0
    outcomes: Counter[str] = Counter()
    took_s: list[float] = []

    async def caller(call: Any) -> None:
        nonlocal sent
        while (began := time.perf_counter()) < ends:
            sent += 1
            try:
                await call(request, metadata=metadata, timeout=30)
                outcomes["OK"] += 1
            except grpc.aio.AioRpcError as error:
                outcomes[error.code().name] += 1
            now = time.perf_counter()
            if began >= measured_from and now <= ends:
                took_s.append(now - began)

    calls: list[Any] = [channel.unary_unary(f"/{plan['method']}") for channel in channels]
    await asyncio.gather(*(caller(calls[n % len(calls)]) for n in range(plan["in_flight"])))
    for channel in channels:
        await channel.close()
    took_s.sort()
    return {
        "sent": sent,
        "outcomes": dict(outcomes),
        "rps": len(took_s) / plan["seconds"],
        "p50_ms": took_s[len(took_s) // 2] * 1e3 if took_s else 0.0,
        "p99_ms": took_s[len(took_s) * 99 // 100] * 1e3 if took_s else 0.0,
    }


def h2load(plan: dict[str, Any], program: str) -> dict[str, Any]:
    """Run one plan with h2load: a number of calls, so that none is cut off at the end.

    h2load takes an error of gRPC's for a success of HTTP's. But an error has no body, so all
    answers were OK if as many bytes came as that many answers have.
    """
    answer_bytes = len(_one_answer(plan)) + _FRAME_BYTES
    warm = _run_h2load(plan, program, 20 * plan["in_flight"])
    found = _run_h2load(plan, program, max(100, int(warm["rps"] * plan["seconds"])))
    sent = warm["sent"] + found["sent"]
    arrived = warm["data_bytes"] + found["data_bytes"]
    # Receipts differ by a few bytes; answers of nobody else's do.
    missing = (sent * (answer_bytes - plan["slack_bytes"]) - arrived) / answer_bytes
    failed = max(0, ceil(missing)) + warm["failed"] + found["failed"]
    return found | {"sent": sent + 1, "outcomes": {"OK": sent + 1 - failed}}


def _one_answer(plan: dict[str, Any]) -> bytes:
    with grpc.insecure_channel(plan["address"]) as channel:
        call: Any = channel.unary_unary(f"/{plan['method']}")
        answer: bytes = call(
            bytes.fromhex(plan["request_hex"]), metadata=list(plan["metadata"].items()), timeout=30
        )
    return answer


def _run_h2load(plan: dict[str, Any], program: str, calls: int) -> dict[str, Any]:
    request = bytes.fromhex(plan["request_hex"])
    connections = min(_CHANNELS, plan["in_flight"])
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-") as directory:
        body, log = Path(directory, "body"), Path(directory, "log")
        body.write_bytes(b"\0" + len(request).to_bytes(4, "big") + request)
        headers = {"content-type": "application/grpc", "te": "trailers"} | plan["metadata"]
        command = [program, f"--requests={calls}", f"--clients={connections}", f"--data={body}"]
        command += [f"--max-concurrent-streams={plan['in_flight'] // connections}"]
        command += [f"--log-file={log}", *(f"--header={k}: {v}" for k, v in headers.items())]
        command += [f"http://{plan['address']}/{plan['method']}"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        took_us = sorted(int(line.split()[2]) for line in log.read_text().splitlines())
    done = re.search(r"finished in .*?, ([\d.]+) req/s", said)
    succeeded = re.search(r"(\d+) succeeded", said)
    data = re.search(r"\((\d+)\) data", said)
    if not (done and succeeded and data):
        raise RuntimeError(f"h2load did not say what it did: {said}")
    return {
        "sent": calls,
        "failed": calls - int(succeeded[1]),
        "data_bytes": int(data[1]),
        "rps": float(done[1]),
        "p50_ms": took_us[len(took_us) // 2] / 1e3,
        "p99_ms": took_us[len(took_us) * 99 // 100] / 1e3,
    }


def main(plan: dict[str, Any]) -> dict[str, Any]:
    """Run one plan with the best load there is."""
    program = which("h2load")
    return h2load(plan, program) if program else uvloop.run(load(plan))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
