"""Closed-loop load in a process of its own: so many calls in flight for so long, every one checked.

    python -m bench.load '{"address": …, "method": …, "request_hex": …, "metadata": …,
                           "in_flight": 64, "seconds": 4}'

Prints one JSON object: calls sent, calls answered OK, and calls per second, p50 and p99 in
milliseconds after the warm-up.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections import Counter
from typing import Any

import grpc
import uvloop

WARM_UP_S = 0.7
_CHANNELS = 2


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


if __name__ == "__main__":
    print(json.dumps(uvloop.run(load(json.loads(sys.argv[1])))))
