"""The corpus daemon: `python -m services.corpus.main`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from pydantic import Field, SecretStr
from semantic_text_splitter import MarkdownSplitter
from tollgate.corpus.v1.corpus_pb2_grpc import add_CorpusServiceServicer_to_server

from chassis.client import Peer
from chassis.database import database, room_pool
from chassis.server import Daemon, StartError, launch
from chassis.settings import Address, MeshSettings, RoomSettings, room_config
from chassis.tasks import finish
from chassis.tokens import count_tokens, minilm_tokenizer, tokenizer_of
from services.corpus.chunking import Chunker, Splitter
from services.corpus.clients import Router
from services.corpus.core import CLEAN, Changes, Stage
from services.corpus.jobs import JobQueue, Workers, install
from services.corpus.library import Library
from services.corpus.pipeline import Limits, Pipeline
from services.corpus.service import CorpusService
from services.corpus.store import MIGRATIONS, ROLE, ROOM, Store, prepare

SERVICE = "tollgate.corpus.v1.CorpusService"


class Settings(RoomSettings):
    """Settings of the corpus, under TOLLGATE_CORPUS_."""

    model_config = room_config("corpus")

    listen: Address = Field("127.0.0.1:50055", description="Where the corpus listens.")
    model: str = Field(
        "all-MiniLM-L6-v2", description="The embedding model of documents and questions."
    )
    chunk_tokens: int = Field(
        200, ge=16, le=8_000, description="The most tokens of a chunk, its headings aside."
    )
    heading_tokens: int = Field(
        48, ge=0, le=1_000, description="The most tokens of the headings embedded before a chunk."
    )
    pages_max: int = Field(5_000, ge=1, description="The most pages of a document.")
    chunk_timeout_s: float = Field(
        300.0, gt=0, description="How long a document may take to be cut into chunks."
    )
    parse_concurrency: int = Field(2, ge=1, description="Documents parsed at a time.")
    chunk_concurrency: int = Field(2, ge=1, description="Documents chunked at a time.")
    embed_concurrency: int = Field(4, ge=1, description="Documents embedded at a time.")
    batch_texts: int = Field(64, ge=1, le=1_000, description="Texts in one call of Embed.")
    batches_in_flight: int = Field(
        2, ge=1, description="Calls of Embed under way for one document."
    )
    attempts_max: int = Field(
        5, ge=1, description="Attempts of a stage that may have been paid for in vain."
    )
    wait_max_s: float = Field(
        86_400.0, gt=0, description="How long a document waits for a room that is away."
    )
    heartbeat_timeout_s: float = Field(
        3.0, ge=1, description="How long a worker is silent before its jobs are taken over."
    )
    pool_max: int = Field(8, ge=2, description="The most connections to the database.")


@asynccontextmanager
async def wire(mesh: MeshSettings, settings: Settings) -> AsyncIterator[Daemon]:
    """Start the corpus; it serves and works until the context ends."""
    if mesh.database_pooled and mesh.database_direct_url is None:
        raise StartError(
            f"{ROOM}: its job queue cannot work through a transaction-mode pooler; "
            "set TOLLGATE_DATABASE_DIRECT_URL"
        )
    async with database(mesh) as url:
        found = mesh.model_copy(update={"database_url": SecretStr(url)})
        direct = found.database_direct_url.get_secret_value() if found.database_direct_url else url
        async with room_pool(
            found, ROOM, MIGRATIONS, size_max=settings.pool_max, prepare=prepare
        ) as pool:
            await install(direct, role=ROLE)
            changes = Changes()
            store = Store(pool, JobQueue(), changes)
            peer = Peer(mesh.router_address, mesh)
            router = Router(peer)
            pipeline = Pipeline(
                store, router.gate, chunker(settings), settings.model, _limits(settings)
            )
            workers = Workers(
                pipeline.run,
                pool=pool,
                url=direct,
                role=ROLE,
                classes=[
                    {Stage.PARSE: settings.parse_concurrency},
                    {
                        Stage.CHUNK: settings.chunk_concurrency,
                        Stage.EMBED: settings.embed_concurrency,
                        Stage.INDEX: settings.embed_concurrency,
                        CLEAN: 1,
                    },
                ],
                heartbeat_timeout_s=settings.heartbeat_timeout_s,
            )
            daemon = Daemon(ROOM, mesh, listen=settings.listen)
            library = Library(store, router.gate, changes, settings.model)
            add_CorpusServiceServicer_to_server(CorpusService(library), daemon.server)
            daemon.serves(SERVICE, providers=["corpus"])
            stopping: asyncio.Task[None] | None = None
            try:
                async with daemon.serving():
                    workers.start()
                    try:
                        yield daemon
                    finally:
                        # While the daemon drains: watchers go elsewhere, jobs end or are put back.
                        changes.close()
                        stopping = finish(workers.stop(mesh.grace_s))
            finally:
                if stopping is not None:
                    await stopping
                await peer.close()


def _limits(settings: Settings) -> Limits:
    return Limits(
        pages_max=settings.pages_max,
        chunk_timeout_s=settings.chunk_timeout_s,
        batch_texts=settings.batch_texts,
        batches_in_flight=settings.batches_in_flight,
        attempts_max=settings.attempts_max,
        wait_max_s=settings.wait_max_s,
    )


def chunker(settings: Settings) -> Chunker:
    """What cuts documents as the settings say. Raises StartError for a model that nobody counts."""
    tokenizer = tokenizer_of("", settings.model)
    if tokenizer is None:
        raise StartError(
            f"{ROOM}: nothing here counts tokens of TOLLGATE_CORPUS_MODEL={settings.model}"
        )

    def count(text: str) -> int:
        return count_tokens(tokenizer, [text])[0]

    splitter: Splitter = (
        MarkdownSplitter.from_huggingface_tokenizer(minilm_tokenizer(), settings.chunk_tokens)
        if tokenizer == "minilm"
        else MarkdownSplitter.from_callback(count, settings.chunk_tokens)
    )
    return Chunker(splitter, count, settings.heading_tokens)


if __name__ == "__main__":
    launch(wire, Settings)
