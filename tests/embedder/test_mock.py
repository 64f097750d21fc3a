"""What the embedder's mock promises."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from chassis.errors import OutcomeUnknown
from chassis.tokens import count_tokens
from services.embedder.core import Portion, Vectors
from services.embedder.providers.mock import Failure, Mock, Settings, provider


async def embed(mock: Mock, texts: list[str], model: str = "mock-384") -> Vectors:
    found = mock.model(model)
    assert found is not None
    answer = (await mock.embed([Portion(found, texts, count_tokens("words", texts))]))[0]
    if isinstance(answer, Exception):
        raise answer
    return answer


@pytest.fixture
def mock(tmp_path: Path) -> Mock:
    return provider(Settings(), tmp_path)


def test_a_text_has_the_same_vector_in_every_process(mock: Mock) -> None:
    """The vector of a text depends on the text alone: not on the process, nor on its batch."""
    code = (
        "import asyncio; from pathlib import Path\n"
        "from services.embedder.core import Portion\n"
        "from services.embedder.providers.mock import Settings, provider\n"
        "mock = provider(Settings(), Path('.'))\n"
        "texts = ['the gate holds the price']\n"
        "portion = Portion(mock.model('mock-384'), texts, [5])\n"
        "print(asyncio.run(mock.embed([portion]))[0].tobytes().hex())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    both = asyncio.run(embed(mock, ["bananas are yellow", "the gate holds the price"]))
    assert both[1].tobytes().hex() == other.stdout.strip()


async def test_texts_that_share_words_are_near(mock: Mock) -> None:
    """The more words two texts share the nearer they are, whatever their case and punctuation."""
    question, near, far, same = await embed(
        mock,
        [
            "how do I reset my password",
            "Reset your password here, and how",
            "bananas are yellow",
            "How do I RESET my password?!",
        ],
    )
    assert question @ same == pytest.approx(1.0)
    assert question @ near > 0.4
    assert abs(question @ far) < 0.2


@pytest.mark.parametrize("dimensions", [1, 7, 384, 4096])
async def test_vectors_have_the_dimensions_asked_for_and_unit_length(
    mock: Mock, dimensions: int
) -> None:
    """`mock-<dimensions>` gives unit vectors of that size, for any text at all."""
    texts = ["one", "!?", "日本語", "x" * 10_000, " ".join(map(str, range(2_000)))]
    vectors = await embed(mock, texts, f"mock-{dimensions}")
    assert vectors.shape == (5, dimensions)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)


def test_names_of_no_model_are_unknown(mock: Mock) -> None:
    """Only sizes that can be served make a model."""
    for name in ("mock-0", "mock-4097", "mock--1", "mock-384 ", "mock-", "mock", "", "gpt-4"):
        assert mock.model(name) is None


def test_every_model_is_marked_as_simulated(mock: Mock) -> None:
    """A simulated space can never be taken for a genuine one."""
    assert mock.simulated
    assert {model.space_id.split(":")[0] for model in mock.models()} == {"simulated"}
    sizes = {model.name: model.dimensions for model in mock.models()}
    assert sizes["all-MiniLM-L6-v2"] == 384
    assert sizes["text-embedding-3-large"] == 3072


async def test_a_text_is_cut_to_its_tokens(mock: Mock) -> None:
    """Words past the tokens that are paid for do not change the vector."""
    model = mock.model("mock-64")
    assert model is not None
    cut, short = await mock.embed(
        [Portion(model, ["one two  three four"], [2]), Portion(model, ["one two"], [2])]
    )
    assert np.array_equal(cut, short)


async def test_it_fails_as_often_and_as_it_is_told(tmp_path: Path) -> None:
    """Each so-manieth call fails in the way that was set, and the others do not."""
    mock = provider(Settings(fail_every=3, fail_with=Failure.OUTCOME_UNKNOWN), tmp_path)
    for call in range(1, 7):
        if call % 3:
            await embed(mock, ["text"])
        else:
            with pytest.raises(OutcomeUnknown):
                await embed(mock, ["text"])
