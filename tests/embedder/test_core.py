"""What the embedder's pure rules promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from tollgate.embedder.v1 import embedder_pb2 as pb

from services.embedder.core import (
    ANSWER_BYTES_MAX,
    BatchLimits,
    Model,
    Portion,
    Space,
    inputs_that_fit,
    packs,
    portions,
)
from services.embedder.service import packed

MODEL = Model("m", 3, 256, "words", "s")
SPACE = Space("m", "0" * 64, 384, "mean", "none", "l2", "none")

lengths = st.lists(st.integers(1, 256), min_size=1, max_size=80)


@given(lengths=lengths, tokens_max=st.integers(1, 2_000), padding_max=st.floats(0, 0.5))
def test_packs_hold_every_text_once_within_bounds(
    lengths: list[int], tokens_max: int, padding_max: float
) -> None:
    """Packing loses no text and repeats none, and every shared pack is within its bounds."""
    packed_texts = packs(lengths, tokens_max=tokens_max, padding_max=padding_max)
    assert sorted(place for pack in packed_texts for place in pack) == list(range(len(lengths)))
    for pack in packed_texts:
        size = max(lengths[place] for place in pack) * len(pack)
        padding = size - sum(lengths[place] for place in pack)
        assert len(pack) == 1 or (size <= tokens_max and padding <= padding_max * size)


@given(lengths=lengths, texts_max=st.integers(1, 20), tokens_max=st.integers(1, 1_000))
def test_portions_keep_the_order_and_fit_a_batch(
    lengths: list[int], texts_max: int, tokens_max: int
) -> None:
    """A call cut into portions is the same texts in the same order, each portion within limits."""
    texts = [str(place) for place in range(len(lengths))]
    whole = Portion(MODEL, texts, lengths)
    cut = list(portions(whole, BatchLimits(texts_max, tokens_max, 1)))
    assert [text for portion in cut for text in portion.texts] == texts
    assert [count for portion in cut for count in portion.tokens] == lengths
    for portion in cut:
        assert 1 <= len(portion.texts) <= texts_max
        assert portion.weight <= tokens_max or len(portion.texts) == 1


@given(st.integers(1, 4_096))
def test_an_answer_of_as_many_inputs_as_fit_is_within_the_limit(dimensions: int) -> None:
    """The number of inputs that a refusal names does fit the answer's limit."""
    row = packed(np.zeros((1, dimensions), dtype=np.float32))
    assert len(row) * inputs_that_fit(dimensions) <= ANSWER_BYTES_MAX


@given(texts=st.integers(1, 5), dimensions=st.integers(1, 4_096))
def test_vectors_are_packed_as_protobuf_packs_them(texts: int, dimensions: int) -> None:
    """The copied bytes are what protobuf itself would have written."""
    vectors = np.random.default_rng(texts).random((texts, dimensions), dtype=np.float32)
    slow = pb.EmbedResponse(vectors=[pb.Vector(values=row.tolist()) for row in vectors])
    assert packed(vectors) == slow.SerializeToString()


def test_everything_that_changes_a_vector_changes_its_space() -> None:
    """Two spaces have the same id only if model, weights and every setting are the same."""
    others = [
        replace(SPACE, model="n"),
        replace(SPACE, weights_sha256="1" * 64),
        replace(SPACE, dimensions=256),
        replace(SPACE, pooling="cls"),
        replace(SPACE, prompts="query: "),
        replace(SPACE, normalisation="none"),
        replace(SPACE, quantization="int8"),
    ]
    assert len({space.id for space in (SPACE, *others)}) == len(others) + 1
    assert replace(SPACE).id == SPACE.id == "m:384:" + SPACE.id[-12:]
