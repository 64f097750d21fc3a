"""The pipeline's speed: documents through the whole mesh, against the same libraries in a loop.

The bare loop parses, chunks and embeds in one process of its own and keeps nothing. The mesh does
the same work through router, ledger, sandbox, queue and database. Both read the same files, which
no run has seen before, and have the same cores to themselves.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import grpc
from tollgate.corpus.v1 import corpus_pb2, corpus_pb2_grpc

from cli.demo.write_handbook import pdf
from cli.ports import free_ports
from cli.supervisor import ROOMS

DOCUMENTS, PAGES = 24, 6
_READY_S = 300.0
_METADATA = (("tollgate-tenant", "bench"),)


def measure() -> dict[str, float]:
    """Pages and chunks a second of both, and their ratio. Fails unless every document is READY."""
    with tempfile.TemporaryDirectory(prefix="tollgate-bench-") as directory:
        files = write_documents(Path(directory) / "documents", DOCUMENTS)
        env = _environment(Path(directory) / "state")
        with _running(env):
            mesh = asyncio.run(_through_mesh(env["TOLLGATE_ROUTER_ADDRESS"], files))
        loop = subprocess.run(
            [sys.executable, "-m", "bench.pipeline", directory],
            env=env,
            stdout=subprocess.PIPE,
            check=True,
        )
    bare = json.loads(loop.stdout)
    if bare["chunks"] != mesh["chunks"] or bare["pages"] != mesh["pages"]:
        raise RuntimeError(f"not the same work: {bare} and {mesh}")
    return {
        "pipeline_pages_s": mesh["pages"] / mesh["seconds"],
        "pipeline_chunks_s": mesh["chunks"] / mesh["seconds"],
        "pipeline_bare_pages_s": bare["pages"] / bare["seconds"],
        "pipeline_bare_chunks_s": bare["chunks"] / bare["seconds"],
        "pipeline_ratio": bare["seconds"] / mesh["seconds"],
    }


def write_documents(directory: Path, count: int) -> list[Path]:
    """PDFs of some pages; no two paragraphs are the same, so that none is paid once for two."""
    directory.mkdir()
    random = Random(7)
    words = [f"{a}{b}" for a in ("tide", "quay", "sail", "lamp", "rope", "gull") for b in range(40)]
    files = []
    for number in range(count):
        sheets = [
            f"# Part {page} of {number}\n\n"
            + "\n\n".join(" ".join(random.choices(words, k=60)) + "." for _ in range(4))
            for page in range(PAGES)
        ]
        files.append(directory / f"{number:03}.pdf")
        files[-1].write_bytes(pdf(sheets, f"Log {number}"))
    return files


async def _through_mesh(router: str, files: list[Path]) -> dict[str, float]:
    async with grpc.aio.insecure_channel(router) as channel:
        corpus = corpus_pb2_grpc.CorpusServiceStub(channel)

        async def add(file: Path, collection: str) -> Any:
            request = corpus_pb2.AddDocumentRequest(
                document_id=file.stem,
                collection=collection,
                file_name=file.name,
                content=file.read_bytes(),
            )
            await corpus.AddDocument(request, metadata=_METADATA, wait_for_ready=True)
            watch = corpus.WatchDocument(
                corpus_pb2.WatchDocumentRequest(collection=collection, document_id=file.stem),
                metadata=_METADATA,
                timeout=_READY_S,
            )
            async for event in watch:
                document = event.document
            if document.state != corpus_pb2.DOCUMENT_STATE_READY:
                raise RuntimeError(f"{file.name} did not become ready: {document.reason}")
            return document

        # The first document waits for what every daemon does once; its text is its own.
        warm = write_documents(files[0].parent / "warm", 1)[0]
        await add(warm, "warm")
        started = time.perf_counter()
        documents = await asyncio.gather(*(add(file, "bench") for file in files[1:]))
        seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "pages": sum(document.progress.pages_done for document in documents),
        "chunks": sum(document.progress.chunks_done for document in documents),
    }


async def _bare(files: list[Path], state: Path) -> dict[str, float]:
    from liteparse import LiteParse

    from chassis.tokens import count_tokens
    from services.corpus.core import ParsedPage
    from services.corpus.main import Settings as CorpusSettings
    from services.corpus.main import chunker
    from services.embedder.core import Portion
    from services.embedder.providers import minilm

    parser = LiteParse(ocr_enabled=False, output_format="markdown", image_mode="off", quiet=True)
    settings = CorpusSettings()
    cutter = chunker(settings)
    embedder = minilm.provider(minilm.Settings(), state / "embedder")
    await embedder.start()
    model = embedder.models()[0]
    pages = chunks = 0

    async def document(file: Path) -> None:
        nonlocal pages, chunks
        parsed = [
            ParsedPage(page.page_num, page.markdown)
            for page in parser.parse(file.read_bytes()).pages
        ]
        texts = [chunk.embedded_text for chunk in cutter.chunks(parsed)]
        await embedder.embed([Portion(model, texts, count_tokens("minilm", texts))])
        pages, chunks = pages + len(parsed), chunks + len(texts)

    await document(files[0])
    pages = chunks = 0
    started = time.perf_counter()
    for file in files[1:]:
        await document(file)
    seconds = time.perf_counter() - started
    await embedder.close()
    return {"seconds": seconds, "pages": pages, "chunks": chunks}


def _environment(state: Path) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("TOLLGATE_")}
    ports = zip(ROOMS, free_ports(len(ROOMS)), strict=True)
    addresses = {f"TOLLGATE_{room.upper()}_ADDRESS": f"127.0.0.1:{port}" for room, port in ports}
    return (
        clean
        | addresses
        | {
            "TOLLGATE_STATE_DIR": str(state),
            "TOLLGATE_TRACE_SAMPLE_RATIO": "0.1",
        }
    )


class _running:
    """A mesh as `tollgate up` runs it, for as long as the context lasts."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env

    def __enter__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "up", "--json"],
            env=self._env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if json.loads(line)["event"] == "serving":
                return
        raise RuntimeError("the mesh did not start")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.communicate(timeout=60)


if __name__ == "__main__":
    root = Path(sys.argv[1])
    print(
        json.dumps(asyncio.run(_bare(sorted((root / "documents").glob("*.pdf")), root / "state")))
    )
