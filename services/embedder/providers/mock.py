"""The mock: deterministic vectors at no cost, in which texts that share words are near.

A word's vector is its SHAKE-128 stream read as signed bytes; a text's is the sum over its distinct
words, scaled to length 1 (random indexing, Kanerva 2000). Two texts' cosine is thus about the part
of their words that they share, so a search over mock data makes sense.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Sequence
from enum import StrEnum
from functools import lru_cache
from pathlib import Path

import numpy as np
from pydantic import Field
from pydantic_settings import BaseSettings

from chassis.errors import OutcomeUnknown, ProviderRejected, ProviderUnavailable, TollgateError
from chassis.settings import room_config
from services.embedder.core import BatchLimits, Model, Portion, Vectors

_DIMENSIONS_MAX = 4_096
_ANY_DIMENSIONS = re.compile(r"mock-([1-9][0-9]{0,3})")
_WORD = re.compile(r"\w+")

# Distinct words summed at a time: bounds the memory of a long text of many dimensions.
_WORDS_AT_ONCE = 512

_TOKENS_MAX = 8_192
# The real models' names, dimensions and token limits, so that the same request works here too.
_STAND_INS = {
    "all-MiniLM-L6-v2": (384, 256),
    "text-embedding-3-small": (1536, 8_192),
    "text-embedding-3-large": (3072, 8_192),
    "text-embedding-ada-002": (1536, 8_192),
}


class Failure(StrEnum):
    """How a call of the mock fails, when it is told to."""

    UNAVAILABLE = "unavailable"
    REJECTED = "rejected"
    OUTCOME_UNKNOWN = "outcome_unknown"


class Settings(BaseSettings):
    """Settings of the mock, under TOLLGATE_EMBEDDER_MOCK_."""

    model_config = room_config("embedder_mock")

    latency_s: float = Field(0.0, ge=0, description="How long every batch takes, in seconds.")
    fail_every: int = Field(0, ge=0, description="Fail each so-manieth call; never when 0.")
    fail_with: Failure = Field(Failure.UNAVAILABLE, description="How a call fails.")


class Mock:
    """Serves `mock-<dimensions>` and the names of the real models, as simulated vectors."""

    name = "mock"
    simulated = True
    # It computes on the event loop: a batch is some 20 ms of work at the most.
    limits = BatchLimits(texts_max=2_048, tokens_max=16_384, in_flight=16)

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._calls = 0

    def models(self) -> Sequence[Model]:
        """`mock-384`, for every other size like it, and the stand-ins."""
        return [_any_model(384), *(_model(name, *sizes) for name, sizes in _STAND_INS.items())]

    @lru_cache(maxsize=256)  # noqa: B019 -- there is one mock a process
    def model(self, name: str) -> Model | None:
        """The stand-in of that name, or the mock of as many dimensions as the name says."""
        if name in _STAND_INS:
            return _model(name, *_STAND_INS[name])
        match = _ANY_DIMENSIONS.fullmatch(name)
        dimensions = int(match[1]) if match else 0
        return _any_model(dimensions) if 1 <= dimensions <= _DIMENSIONS_MAX else None

    async def start(self) -> None:
        """Nothing to make ready."""

    async def close(self) -> None:
        """Nothing to let go."""

    async def embed(self, portions: list[Portion]) -> Sequence[Vectors | Exception]:
        """The vectors of each portion, or the failure that it was told to have."""
        if self._settings.latency_s:
            await asyncio.sleep(self._settings.latency_s)
        return [self._failure() or _vectors(portion) for portion in portions]

    def _failure(self) -> TollgateError | None:
        every = self._settings.fail_every
        self._calls += 1
        if not every or self._calls % every:
            return None
        match self._settings.fail_with:
            case Failure.UNAVAILABLE:
                return ProviderUnavailable("the mock was told to be unavailable")
            case Failure.REJECTED:
                return ProviderRejected("the mock was told to reject this")
            case Failure.OUTCOME_UNKNOWN:
                return OutcomeUnknown("the mock was told to lose the outcome")


def provider(settings: Settings, cache_dir: Path) -> Mock:
    """The mock; it keeps nothing in the cache."""
    del cache_dir
    return Mock(settings)


def _any_model(dimensions: int) -> Model:
    return _model(f"mock-{dimensions}", dimensions, _TOKENS_MAX)


def _model(name: str, dimensions: int, tokens_max: int) -> Model:
    space_id = f"simulated:mock:{dimensions}"
    return Model(name, dimensions, tokens_max, tokenizer="words", space_id=space_id)


def _vectors(portion: Portion) -> Vectors:
    dimensions = portion.model.dimensions
    vectors = np.empty((len(portion.texts), dimensions), dtype=np.float32)
    for row, text, tokens in zip(vectors, portion.texts, portion.tokens, strict=True):
        _embed(text, tokens, row)
    return vectors


def _embed(text: str, tokens: int, row: Vectors) -> None:
    """Write into `row` the unit vector of a text's first `tokens` tokens (words)."""
    runs = text.split()
    if len(runs) > tokens:
        text = " ".join(runs[:tokens])
    # Sums of integers do not depend on the order of a set.
    words = list(set(_WORD.findall(text.lower()))) or [text]
    dimensions = len(row)
    row[:] = 0
    for first in range(0, len(words), _WORDS_AT_ONCE):
        few = words[first : first + _WORDS_AT_ONCE]
        stream = b"".join([_word(word, dimensions) for word in few])
        rows = np.frombuffer(stream, dtype=np.int8).reshape(len(few), dimensions)
        row += rows.sum(axis=0, dtype=np.int32)
    length = float(np.sqrt(row @ row))
    if length:
        row /= length
    else:
        row[0] = 1.0


@lru_cache(maxsize=8_192)
def _word(word: str, dimensions: int) -> bytes:
    return hashlib.shake_128(word.encode()).digest(dimensions)
