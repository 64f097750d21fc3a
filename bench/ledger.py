"""The ledger's speed: `BatchAuthorize` + `BatchSettle` over gRPC, against plain SQL beside it.

Plain SQL is what one would write first: one row at a time, a statement to authorize and one to
settle, one hot budget, sixteen connections. Both run on the embedded database as it is shipped (it
waits for the disk), with the daemon and the load as processes of their own. A run counts only if as
many holds were settled as were asked for.

    python -m bench.ledger
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import asyncpg
import grpc
import uvloop
from google.protobuf.duration_pb2 import Duration
from google.protobuf.field_mask_pb2 import FieldMask
from tollgate.cost.v1 import cost_pb2 as pb
from tollgate.cost.v1 import limit_pb2, usage_pb2
from tollgate.cost.v1.cost_pb2_grpc import CostServiceStub
from tollgate.cost.v1.limit_pb2_grpc import LimitServiceStub
from tollgate.cost.v1.usage_pb2_grpc import UsageServiceStub

from chassis.call import IDENTITY, Call
from chassis.embedded import EmbeddedPostgres
from chassis.identity import sign
from chassis.probe import probe

SECRET = "the secret of a bench"
TURNS = 3
SECONDS = 2.0
WARM_UP_S = 0.7
CONNECTIONS = 16
# Batch size -> batches in flight.
SIZES = {1: 16, 64: 16, 256: 8}
_START_S = 60.0
_SERVICE = "tollgate.cost.v1.CostService"
_SCOPE = usage_pb2.Scope(tenant="bench", service="embedder", provider="mock", model="small")

_PLAIN_TABLES = """
DROP SCHEMA IF EXISTS plain CASCADE;
CREATE SCHEMA plain;
CREATE TABLE plain.budgets (
    id int PRIMARY KEY, held bigint NOT NULL, settled bigint NOT NULL, maximum bigint NOT NULL
) WITH (fillfactor = 40);
CREATE TABLE plain.holds (
    id uuid PRIMARY KEY, budget int NOT NULL, tokens bigint NOT NULL, held bigint NOT NULL,
    settled bigint, state smallint NOT NULL, create_time timestamptz NOT NULL DEFAULT now()
);
CREATE TABLE plain.entries (
    hold uuid NOT NULL, tokens bigint NOT NULL, charged bigint NOT NULL,
    write_time timestamptz NOT NULL DEFAULT now()
);
INSERT INTO plain.budgets VALUES (1, 0, 0, 9000000000000000000);
"""
_PLAIN_AUTHORIZE = """
WITH budget AS (
    UPDATE plain.budgets SET held = held + $2
    WHERE id = 1 AND held + settled + $2 <= maximum RETURNING id
)
INSERT INTO plain.holds (id, budget, tokens, held, state)
SELECT $1, id, $3, $2, 1 FROM budget
"""
_PLAIN_SETTLE = """
WITH hold AS (
    UPDATE plain.holds SET state = 2, settled = $2 WHERE id = $1 AND state = 1
    RETURNING id, budget, tokens, held
), budget AS (
    UPDATE plain.budgets SET held = budgets.held - hold.held, settled = budgets.settled + $2
    FROM hold WHERE budgets.id = hold.budget
)
INSERT INTO plain.entries (hold, tokens, charged) SELECT id, tokens, $2 FROM hold
"""


class BenchError(Exception):
    """A run does not count. The message says why."""


def measure(seconds: float = SECONDS) -> dict[str, float]:
    """Holds a second of the ledger and of plain SQL, authorized and settled, and their ratios.

    They take turns, and a ratio is that of one turn, so that a machine that is busy for a while
    slows both; the figures are medians of the turns. Raises BenchError where a run does not count.
    """
    plain: list[float] = []
    turns: dict[int, list[float]] = {size: [] for size in SIZES}
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-") as directory:
        state = Path(directory)
        with (
            EmbeddedPostgres.start(state / "postgres") as server,
            _daemon(state, server.url) as address,
        ):
            for _ in range(TURNS):
                plain.append(_child("plain", {"url": server.url, "seconds": seconds}))
                for size, in_flight in SIZES.items():
                    plan = {"address": address, "size": size, "in_flight": in_flight}
                    turns[size].append(_child("ledger", plan | {"seconds": seconds}))
    found = {f"ledger_holds_{size}": median(turns[size]) for size in SIZES}
    found["ledger_plain_sql_holds"] = median(plain)
    for size in (64, 256):
        pairs = zip(turns[size], plain, strict=True)
        found[f"ledger_ratio_{size}"] = median(ours / theirs for ours, theirs in pairs)
    return found


def _child(what: str, plan: dict[str, Any]) -> float:
    """Run one load in a process of its own; holds a second."""
    run = subprocess.run(
        [sys.executable, "-m", "bench.ledger", what, json.dumps(plan)],
        capture_output=True,
        text=True,
        check=False,
    )
    if run.returncode != 0:
        raise BenchError(run.stderr.strip()[-2_000:] or what)
    return float(run.stdout)


@contextmanager
def _daemon(state: Path, url: str) -> Iterator[str]:
    """A cost daemon of its own; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = os.environ | {
        "TOLLGATE_DATABASE_URL": url,
        "TOLLGATE_STATE_DIR": str(state),
        "TOLLGATE_MESH_SECRET": SECRET,
        "TOLLGATE_COST_LISTEN": address,
        "TOLLGATE_LOG_LEVEL": "ERROR",
        "TOLLGATE_TRACE_SAMPLE_RATIO": "0.1",
    }
    daemon = subprocess.Popen([sys.executable, "-m", "services.cost.main"], env=environment)
    try:
        _wait(address, daemon)
        yield address
    finally:
        daemon.terminate()
        daemon.wait(30)


def _wait(address: str, daemon: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + _START_S
    while probe(address, _SERVICE) != "SERVING":
        if daemon.poll() is not None or time.monotonic() > ends:
            raise BenchError("the ledger did not start")
        time.sleep(0.05)


# --- the ledger ------------------------------------------------------------------------------


async def _ledger(plan: dict[str, Any]) -> float:
    """Batches of one size, so many in flight, each authorized and then settled."""
    identity = sign(Call(tenant="bench"), SECRET.encode(), lifetime_s=3600)
    metadata = ((IDENTITY, identity),)
    async with grpc.aio.insecure_channel(
        plan["address"], options=[("grpc.max_receive_message_length", 64 << 20)]
    ) as channel:
        cost = CostServiceStub(channel)
        await _raise_limits(LimitServiceStub(channel), metadata)
        before = await _settled(UsageServiceStub(channel), metadata)
        began = time.perf_counter() + WARM_UP_S
        ends = began + plan["seconds"]
        lanes = [_lane(cost, metadata, plan["size"], began, ends) for _ in range(plan["in_flight"])]
        counts = await asyncio.gather(*lanes)
        asked, measured = (sum(column) for column in zip(*counts, strict=True))
        settled = await _settled(UsageServiceStub(channel), metadata) - before
    if settled != asked:
        raise BenchError(f"{asked} holds were asked for and {settled} settled")
    return float(measured / (time.perf_counter() - began))


async def _lane(
    cost: CostServiceStub, metadata: Any, size: int, began: float, ends: float
) -> tuple[int, int]:
    """One caller, a batch at a time. How many holds it made, and how many of them in the time."""
    authorize = pb.BatchAuthorizeRequest(
        items=[
            pb.BatchAuthorizeItem(
                request=pb.AuthorizeRequest(
                    scope=_SCOPE,
                    operation="tollgate.embedder.v1.EmbedderService/Embed",
                    bound=usage_pb2.Usage(tokens=900 + n),
                    ttl=Duration(seconds=60),
                )
            )
            for n in range(size)
        ]
    )
    settle = pb.BatchSettleRequest(
        items=[
            pb.BatchSettleItem(
                settle=pb.SettleRequest(tenant="bench", usage=usage_pb2.Usage(tokens=800 + n))
            )
            for n in range(size)
        ]
    )
    asked = measured = 0
    while time.perf_counter() < ends:
        for asking, ending in zip(authorize.items, settle.items, strict=True):
            asking.request.hold_id = ending.settle.hold_id = _new_id()
        # Whether each was settled is counted in the end: the load must not be what is measured.
        await cost.BatchAuthorize(authorize, metadata=metadata, timeout=30)
        await cost.BatchSettle(settle, metadata=metadata, timeout=30)
        asked += size
        if time.perf_counter() >= began:
            measured += size
    return asked, measured


def _new_id() -> str:
    digits = f"{random.getrandbits(128):032x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


async def _raise_limits(limits: LimitServiceStub, metadata: Any) -> None:
    """One hot budget, large enough: the limits of a fresh install, with other maxima."""
    for limit_id in ("default-day", "default-hour"):
        limit = limit_pb2.Limit(id=limit_id, maximum=9_000_000_000_000_000_000)
        change = limit_pb2.UpdateLimitRequest(limit=limit, update_mask=FieldMask(paths=["maximum"]))
        await limits.UpdateLimit(change, metadata=metadata)


async def _settled(usage: UsageServiceStub, metadata: Any) -> int:
    """How many holds the ledger has charged."""
    query = usage_pb2.QueryUsageRequest(tenant="bench")
    query.start_time.FromSeconds(int(time.time()) - 3 * 86_400)
    query.end_time.FromSeconds(int(time.time()) + 86_400)
    answer = await usage.QueryUsage(query, metadata=metadata)
    return sum(row.charges for row in answer.rows)


# --- plain SQL -------------------------------------------------------------------------------


async def _plain(plan: dict[str, Any]) -> float:
    """One row at a time, sixteen at once, on one hot budget."""
    pool = await asyncpg.create_pool(plan["url"], min_size=CONNECTIONS, max_size=CONNECTIONS)
    async with pool:
        await pool.execute(_PLAIN_TABLES)
        began = time.perf_counter() + WARM_UP_S
        ends = began + plan["seconds"]
        counts = await asyncio.gather(*(_row_by_row(pool, began, ends) for _ in range(CONNECTIONS)))
        took = time.perf_counter() - began
        asked, measured = (sum(column) for column in zip(*counts, strict=True))
        settled = await pool.fetchval("SELECT count(*) FROM plain.entries")
        left = await pool.fetchval("SELECT held FROM plain.budgets")
        await pool.execute("DROP SCHEMA plain CASCADE")
    if (settled, left) != (asked, 0):
        raise BenchError(f"{asked} rows were asked for and {settled} settled in plain SQL")
    return float(measured / took)


async def _row_by_row(pool: Any, began: float, ends: float) -> tuple[int, int]:
    asked = measured = 0
    async with pool.acquire() as connection:
        authorize = await connection.prepare(_PLAIN_AUTHORIZE)
        settle = await connection.prepare(_PLAIN_SETTLE)
        while time.perf_counter() < ends:
            hold = _new_id()
            await authorize.fetch(hold, 20_000, 1_000)
            await settle.fetch(hold, 18_000)
            asked += 1
            measured += time.perf_counter() >= began
    return asked, measured


if __name__ == "__main__":
    if len(sys.argv) == 1:
        print(json.dumps(measure(), indent=2))
    else:
        run = {"ledger": _ledger, "plain": _plain}[sys.argv[1]]
        print(uvloop.run(run(json.loads(sys.argv[2]))))
