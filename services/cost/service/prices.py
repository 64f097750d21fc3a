"""PriceService: the price list, for operators."""

from __future__ import annotations

from tollgate.cost.v1 import price_pb2 as pb
from tollgate.cost.v1.price_pb2_grpc import PriceServiceServicer

from chassis.errors import InvalidField
from services.cost.core.keepers import CatalogKeeper
from services.cost.core.pages import last_of, page_size, page_token
from services.cost.core.prices import NOW, Price, Unit, checked_price, place_of
from services.cost.service.ledger import Context
from services.cost.service.wire import set_time, to_time


class PriceService(PriceServiceServicer):
    """Prices on the wire."""

    def __init__(self, catalog: CatalogKeeper) -> None:
        self._catalog = catalog

    async def ListPrices(
        self, request: pb.ListPricesRequest, context: Context
    ) -> pb.ListPricesResponse:
        size, question = page_size(request.page_size), ("prices", request.provider)
        last = last_of(question, request.page_token, 1)
        lines = (await self._catalog.reload()).prices.lines(request.provider)
        start = 0
        if last is not None:
            start = next((n for n, line in enumerate(lines, 1) if _place(line) == last[0]), 0)
        page = lines[start : start + size]
        more = len(lines) > start + size
        return pb.ListPricesResponse(
            prices=map(_price, page),
            next_page_token=page_token(question, [_place(page[-1])]) if more else "",
        )

    async def SetPrice(self, request: pb.SetPriceRequest, context: Context) -> pb.SetPriceResponse:
        (price,) = await self._catalog.add_prices([_to_price(request.price)])
        return pb.SetPriceResponse(price=_price(price))


def _place(line: Price) -> str:
    return repr(place_of(line))


def _to_price(asked: pb.Price) -> Price:
    try:
        unit = Unit(asked.unit_price.unit)
    except ValueError:
        names = ", ".join(member.name for member in Unit)
        raise InvalidField.of("price.unit_price.unit", f"must be one of {names}") from None
    has_time = asked.HasField("effective_time")
    return checked_price(
        Price(
            provider=asked.provider,
            model=asked.model,
            operation=asked.operation,
            unit=unit,
            nanos_usd_per_million=asked.unit_price.nanos_usd_per_million,
            effective_time=to_time("price.effective_time", asked.effective_time)
            if has_time
            else NOW,
            source=asked.source,
        )
    )


def _price(price: Price) -> pb.Price:
    message = pb.Price(
        provider=price.provider,
        model=price.model,
        operation=price.operation,
        unit_price=pb.UnitPrice(
            unit=int(price.unit),  # type: ignore[arg-type]  # the numbers are the same
            nanos_usd_per_million=price.nanos_usd_per_million,
        ),
        source=price.source,
        version=price.version,
    )
    set_time(message.effective_time, price.effective_time)
    return message
