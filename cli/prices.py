"""`tollgate prices`: what calls are held and charged at."""

from __future__ import annotations

from typing import Annotated

import typer
from tollgate.cost.v1 import price_pb2, price_pb2_grpc

from cli.caller import PAGE_SIZE
from cli.command import Session, command
from cli.money import usd_column
from cli.terminal import local_time, lower, operation, table

app = typer.Typer()

_WIDE = 110


@command(app)
async def prices(
    session: Session,
    provider: Annotated[str, typer.Option(help="Only this provider's.")] = "",
) -> None:
    """List the prices that calls are held and charged at."""
    found = price_pb2.ListPricesResponse()
    async with session.ledger() as ledger:
        stub = price_pb2_grpc.PriceServiceStub(ledger.channel)
        request = price_pb2.ListPricesRequest(provider=provider, page_size=PAGE_SIZE)
        async for page in ledger.pages(stub.ListPrices, request):
            found.prices.extend(page.prices)
    session.terminal.answer(found)
    amounts = usd_column([p.unit_price.nanos_usd_per_million for p in found.prices])
    rows = [
        [
            p.provider,
            p.model,
            operation(p.operation),
            "free" if p.unit_price.nanos_usd_per_million == 0 else price,
            lower(price_pb2.Unit.Name(p.unit_price.unit), "UNIT_"),
            local_time(p.effective_time)[:10],
            p.source,
        ]
        for p, price in zip(found.prices, amounts, strict=True)
    ]
    columns = ["=provider", "model", "=operation", ">USD a million", "=unit", "=since", "~source"]
    if session.terminal.width < _WIDE:
        # Where a price is from is the longest and the least; --json has it.
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    session.terminal.show(table(*columns, rows=rows) if rows else "no prices")
