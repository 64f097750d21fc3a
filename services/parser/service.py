"""The parser on the wire: proto -> core -> proto, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing

import grpc
from tollgate.cost.v1 import usage_pb2
from tollgate.parser.v1 import parser_pb2 as pb
from tollgate.parser.v1 import parser_pb2_grpc
from tollgate.router.v1 import answer_pb2

from chassis.answer import stamp
from chassis.call import current
from services.parser import core

Fetch = Callable[[pb.Document], AbstractAsyncContextManager[core.Document]]
"""Gets a request's document, from the request or from storage, and lets go of it after."""


class ParserService(parser_pb2_grpc.ParserServiceServicer):
    """Serves `providers` (the first is the default) on documents that `fetch` gets."""

    def __init__(self, providers: Mapping[str, core.Provider], fetch: Fetch) -> None:
        self._providers = providers
        self._fetch = fetch

    async def Parse(
        self,
        request: pb.ParseRequest,
        context: grpc.aio.ServicerContext[pb.ParseRequest, AsyncIterator[pb.ParseResponse]],
    ) -> AsyncIterator[pb.ParseResponse]:
        """The events of a parse, in the order that core gives them."""
        provider = core.choose(self._providers, current().provider)
        core.require_max_pages(request.max_pages)
        async with (
            self._fetch(request.document) as document,
            aclosing(core.parse(provider, document, request.max_pages)) as events,
        ):
            async for event in events:
                if isinstance(event, core.Summary):
                    # A stored document's bytes were counted where it was read.
                    inline = request.document.WhichOneof("source") == "content"
                    usage = usage_pb2.Usage(
                        pages=event.usage.pages,
                        bytes=event.usage.bytes if inline else 0,
                        requests=1,
                    )
                    stamp(context, usage=usage, provenance=_provenance(provider))
                yield _event(event, document)

    async def Inspect(
        self,
        request: pb.InspectRequest,
        context: grpc.aio.ServicerContext[pb.InspectRequest, Awaitable[pb.InspectResponse]],
    ) -> pb.InspectResponse:
        """What the document is."""
        provider = core.choose(self._providers, current().provider)
        async with self._fetch(request.document) as document:
            found = await provider.inspect(document)
            usage = usage_pb2.Usage(requests=1)
            stamp(context, usage=usage, provenance=_provenance(provider))
            return pb.InspectResponse(
                media_type=found.media_type,
                page_count=found.pages,
                encrypted=found.encrypted,
                sha256=document.sha256,
                size_bytes=len(document.content),
            )

    async def ListProviders(
        self,
        request: pb.ListProvidersRequest,
        context: grpc.aio.ServicerContext[
            pb.ListProvidersRequest, Awaitable[pb.ListProvidersResponse]
        ],
    ) -> pb.ListProvidersResponse:
        """The providers, the default first."""
        provenance = answer_pb2.Provenance(attempt=1)
        stamp(context, usage=usage_pb2.Usage(requests=1), provenance=provenance)
        return pb.ListProvidersResponse(
            providers=[
                pb.Provider(name=name, simulated=each.simulated, media_types=each.media_types)
                for name, each in self._providers.items()
            ]
        )


def _provenance(provider: core.Provider) -> answer_pb2.Provenance:
    return answer_pb2.Provenance(provider=provider.name, simulated=provider.simulated, attempt=1)


def _event(event: core.Event, document: core.Document) -> pb.ParseResponse:
    match event:
        case core.Accepted():
            accepted = pb.Accepted(job_id=event.job_id, hold_id=current().hold_id)
            return pb.ParseResponse(accepted=accepted)
        case core.Progress():
            progress = pb.Progress(pages_done=event.pages_done, pages_total=event.pages_total)
            return pb.ParseResponse(progress=progress)
        case core.Page():
            page = pb.Page(number=event.number, markdown=event.markdown, text=event.text)
            return pb.ParseResponse(page=page)
    summary = pb.Summary(
        pages=event.usage.pages, media_type=event.media_type, sha256=document.sha256
    )
    return pb.ParseResponse(summary=summary)
