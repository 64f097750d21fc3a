"""A daemon as a client sees it: metadata in, typed errors out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import grpc

from chassis.client import channel
from chassis.errors import TollgateError
from chassis.settings import MeshSettings
from chassis.status import from_rpc_error

Q = TypeVar("Q")
R = TypeVar("R")
Metadata = Sequence[tuple[str, str]]

TIMEOUT_S = 60.0
PAGE_SIZE = 1_000


class Unreachable(Exception):
    """What was asked for does not answer at an address. The message names it."""


class Caller:
    """Calls one daemon. Use it as a context manager; `channel` is what stubs are made with."""

    def __init__(self, name: str, address: str, mesh: MeshSettings, metadata: Metadata) -> None:
        self.name, self.address = name, address
        self.channel = channel(address, mesh)
        self._metadata = tuple(metadata)

    async def __aenter__(self) -> Caller:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.channel.close()

    async def unary(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        request: Q,
        *,
        metadata: Metadata = (),
        timeout_s: float = TIMEOUT_S,
    ) -> R:
        """One request, one answer. Raises the TollgateError meant, or Unreachable."""
        try:
            return await method(request, timeout=timeout_s, metadata=self._with(metadata))
        except grpc.aio.AioRpcError as error:
            raise self._meant(error) from None

    async def pages(
        self, method: grpc.aio.UnaryUnaryMultiCallable[Any, Any], request: Any
    ) -> AsyncIterator[Any]:
        """Every page of a list, from that of the request on. Raises as `unary` does."""
        while True:
            page = await self.unary(method, request)
            yield page
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def upload(
        self,
        method: grpc.aio.StreamUnaryMultiCallable[Q, R],
        requests: AsyncIterator[Q],
        *,
        metadata: Metadata = (),
        timeout_s: float = 600.0,
    ) -> R:
        """Many requests, one answer. Raises the TollgateError meant, or Unreachable."""
        try:
            return await method(requests, timeout=timeout_s, metadata=self._with(metadata))
        except grpc.aio.AioRpcError as error:
            raise self._meant(error) from None

    async def stream(
        self, method: grpc.aio.UnaryStreamMultiCallable[Q, R], request: Q
    ) -> AsyncIterator[R]:
        """One request, answers for as long as there are any. Raises as `unary` does."""
        streamed = method(request, metadata=self._with(()))
        try:
            async for message in streamed:
                yield message
        except grpc.aio.AioRpcError as error:
            raise self._meant(error) from None
        finally:
            streamed.cancel()

    def _with(self, metadata: Metadata) -> tuple[tuple[str, str], ...]:
        return (*self._metadata, *metadata)

    def _meant(self, error: grpc.aio.AioRpcError) -> TollgateError | Unreachable:
        keys: list[Any] = [key for key, _ in error.trailing_metadata() or ()]
        if "grpc-status-details-bin" in keys:
            return from_rpc_error(error)
        if error.code() is grpc.StatusCode.UNIMPLEMENTED:
            return Unreachable(f"{self.address} is not a {self.name}")
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            return Unreachable(f"the {self.name} does not answer at {self.address}")
        return from_rpc_error(error)
