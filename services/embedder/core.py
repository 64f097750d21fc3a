"""The embedder's rules: what is refused, and how concurrent calls come to share batches.

A call's texts are checked and counted, cut into portions no larger than a batch, and submitted
portion by portion; the provider's batcher puts portions of different calls together. A large call
has one portion in the queue at a time, so a question asked meanwhile waits for one batch, not for
the whole call.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from chassis.batching import Batcher
from chassis.errors import InvalidField, NotFound, ProviderUnavailable, SpaceMismatch, Violation
from chassis.tokens import counted_tokens

# Clients refuse messages over 4 MiB unless told otherwise; this leaves room for the rest.
ANSWER_BYTES_MAX = 3_670_016  # 3.5 MiB

# A vector on the wire: its components, and at most this many bytes of framing.
_COMPONENT_BYTES = 4
_FRAMING_BYTES = 10

# How many faults of one request are named; the rest would only repeat them.
_VIOLATIONS_MAX = 10

# How much of a caller's name for something goes back to it.
_NAME_SHOWN_MAX = 64

# Unit vectors, one a text: [texts, dimensions].
Vectors: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Space:
    """Everything that decides what a vector means: vectors compare only within one space."""

    model: str
    weights_sha256: str
    dimensions: int
    pooling: str
    prompts: str
    normalisation: str
    quantization: str

    @property
    def id(self) -> str:
        """A readable and stable name: model, dimensions, and a digest of all of it."""
        canonical = json.dumps(asdict(self), sort_keys=True).encode()
        return f"{self.model}:{self.dimensions}:{hashlib.sha256(canonical).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Model:
    """A model of a provider. `tokens_max` is per text; `tokenizer` is a name of chassis.tokens."""

    name: str
    dimensions: int
    tokens_max: int
    tokenizer: str
    space_id: str


@dataclass(frozen=True, slots=True)
class Portion:
    """Texts of one call that travel together, and each one's tokens, at most the model's limit.

    A text with more tokens than are given here is cut to that many by the provider.
    """

    model: Model
    texts: Sequence[str]
    tokens: Sequence[int]

    @property
    def weight(self) -> int:
        return sum(self.tokens)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What a provider takes at once: texts and tokens of a batch, and batches in flight."""

    texts_max: int
    tokens_max: int
    in_flight: int


class Provider(Protocol):
    """One way of making vectors: one file in `providers/`, named as the provider is."""

    @property
    def name(self) -> str: ...

    @property
    def simulated(self) -> bool: ...

    @property
    def limits(self) -> BatchLimits: ...

    def models(self) -> Sequence[Model]:
        """The models to list."""
        ...

    def model(self, name: str) -> Model | None:
        """The model of that name, listed or not; None if there is none."""
        ...

    async def start(self) -> None:
        """Make ready to serve; ProviderUnavailable, saying what to do, when that cannot be."""
        ...

    async def close(self) -> None: ...

    async def embed(self, portions: list[Portion]) -> Sequence[Vectors | Exception]:
        """The vectors of each portion, in order, or what went wrong with that portion alone."""
        ...


@dataclass(frozen=True, slots=True)
class Request:
    """What a caller asks. `provider`, `space_id` and `dimensions` that are empty or 0 mean any."""

    model: str
    texts: Sequence[str]
    provider: str = ""
    space_id: str = ""
    dimensions: int = 0
    truncate: bool = False


@dataclass(frozen=True, slots=True)
class Embedding:
    """The answer to one call: its vectors, in order, where they came from, and tokens used."""

    provider: Provider
    model: Model
    vectors: Vectors
    tokens: int


class Embedder:
    """Embeds through the providers it is given; the first that knows a model serves it.

    `on_batch(provider, portions)` is told of every batch. A provider that could not start is
    still known, and its calls are refused.
    """

    def __init__(
        self,
        providers: Sequence[Provider],
        *,
        inputs_max: int,
        waiting_max: int,
        on_batch: Callable[[str, int], None],
    ) -> None:
        self._inputs_max = inputs_max
        self._providers = {provider.name: provider for provider in providers}
        self._batchers = {
            provider.name: _batcher(provider, waiting_max, on_batch) for provider in providers
        }
        self._down: set[str] = set()

    async def start(self) -> Mapping[str, ProviderUnavailable]:
        """Start every provider; answers why, by name, for those that could not."""
        faults: dict[str, ProviderUnavailable] = {}
        for name, provider in self._providers.items():
            try:
                await provider.start()
            except ProviderUnavailable as fault:
                faults[name] = fault
        self._down = set(faults)
        return faults

    async def close(self) -> None:
        """Answer what is queued, then let the providers go."""
        for batcher in self._batchers.values():
            await batcher.close()
        for provider in self._providers.values():
            await provider.close()

    def models(self, provider: str = "") -> list[tuple[Provider, Model]]:
        """The models of one provider, or of all; of those that are up."""
        return [
            (candidate, model)
            for candidate in self._candidates(provider)
            if candidate.name not in self._down
            for model in candidate.models()
        ]

    async def count(
        self, provider: str, model: str, texts: Sequence[str]
    ) -> tuple[Provider, Model, list[int]]:
        """The tokens of each text by the model's own tokenizer, before any truncation.

        Raises InvalidField or NotFound (provider, model).
        """
        counter, found = self._find(provider, model)
        _refuse_amount(texts, self._inputs_max)
        return counter, found, await counted_tokens(found.tokenizer, texts)

    async def embed(self, request: Request) -> Embedding:
        """The vectors of the request's texts.

        Raises InvalidField, NotFound (provider, model), SpaceMismatch, ProviderUnavailable or
        Overloaded.
        """
        provider, model = self._find(request.provider, request.model)
        _refuse_space(request, model)
        _refuse_amount(request.texts, self._inputs_max)
        _refuse_blank(request.texts)
        _refuse_answer(len(request.texts), model)
        if provider.name in self._down:
            raise ProviderUnavailable(f"provider {provider.name} is not available")
        tokens = await counted_tokens(model.tokenizer, request.texts)
        if max(tokens) > model.tokens_max:
            if not request.truncate:
                raise _over_limit(tokens, model)
            tokens = [min(count, model.tokens_max) for count in tokens]
        vectors = await self._vectors(provider, Portion(model, request.texts, tokens))
        return Embedding(provider, model, vectors, sum(tokens))

    async def _vectors(self, provider: Provider, whole: Portion) -> Vectors:
        submit = self._batchers[provider.name].submit
        limits = provider.limits
        if len(whole.texts) <= limits.texts_max and whole.weight <= limits.tokens_max:
            return await submit(whole)
        return np.concatenate([await submit(portion) for portion in portions(whole, limits)])

    def _candidates(self, provider: str) -> Sequence[Provider]:
        if not provider:
            return list(self._providers.values())
        if provider not in self._providers:
            raise _not_found("provider", provider, "no such provider here")
        return [self._providers[provider]]

    def _find(self, provider: str, model: str) -> tuple[Provider, Model]:
        if not model:
            raise InvalidField.of("model", "must name a model; ListModels has them")
        for candidate in self._candidates(provider):
            found = candidate.model(model)
            if found is not None:
                return candidate, found
        raise _not_found("model", model, "no such model here; ListModels has them")


def portions(whole: Portion, limits: BatchLimits) -> Iterator[Portion]:
    """Cut a call's texts, in order, into portions that each fit one batch."""
    first, weight = 0, 0
    for place, tokens in enumerate(whole.tokens):
        full = place - first >= limits.texts_max or weight + tokens > limits.tokens_max
        if full and place > first:
            yield _part(whole, first, place)
            first, weight = place, 0
        weight += tokens
    yield _part(whole, first, len(whole.texts))


def packs(lengths: Sequence[int], *, tokens_max: int, padding_max: float) -> list[list[int]]:
    """Group texts of like length, so that little of a rectangular batch is padding.

    `lengths` are tokens a text; a pack is a list of places in it. A pack of several texts has at
    most `tokens_max` tokens, padding included, of which at most the part `padding_max` is padding.
    """
    packed: list[list[int]] = []
    longest = total = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        size = longest * (len(packed[-1]) + 1) if packed else 0
        padding = size - total - length
        if packed and size <= tokens_max and padding <= padding_max * size:
            packed[-1].append(place)
            total += length
        else:
            packed.append([place])
            longest = total = length
    return packed


def inputs_that_fit(dimensions: int) -> int:
    """How many vectors of so many dimensions one answer holds."""
    return ANSWER_BYTES_MAX // (dimensions * _COMPONENT_BYTES + _FRAMING_BYTES)


def _batcher(
    provider: Provider, waiting_max: int, on_batch: Callable[[str, int], None]
) -> Batcher[Portion, Vectors]:
    run: Callable[[list[Portion]], Awaitable[Sequence[Vectors | Exception]]] = provider.embed
    return Batcher(
        run,
        items_max=provider.limits.texts_max,
        weight=lambda portion: portion.weight,
        weight_max=provider.limits.tokens_max,
        in_flight=provider.limits.in_flight,
        waiting_max=waiting_max,
        on_batch=lambda size: on_batch(provider.name, size),
    )


def _part(whole: Portion, first: int, end: int) -> Portion:
    return Portion(whole.model, whole.texts[first:end], whole.tokens[first:end])


def _not_found(kind: str, name: str, message: str) -> NotFound:
    return NotFound(message, violations=[Violation(f"{kind}/{name[:_NAME_SHOWN_MAX]}", message)])


def _refuse_space(request: Request, model: Model) -> None:
    if request.dimensions not in (0, model.dimensions):
        raise InvalidField.of("dimensions", f"must be {model.dimensions} for this model, or 0")
    if request.space_id and request.space_id != model.space_id:
        raise SpaceMismatch(
            "the model's vectors are in another space",
            violations=[Violation("space_id", f"this model's space is {model.space_id}")],
            metadata={"space_id": model.space_id},
        )


def _refuse_amount(texts: Sequence[str], inputs_max: int) -> None:
    if not texts:
        raise InvalidField.of("inputs", "must hold at least one text")
    if len(texts) > inputs_max:
        raise InvalidField.of("inputs", f"must hold at most {inputs_max} texts")


def _refuse_blank(texts: Sequence[str]) -> None:
    if not all(texts) or any(map(str.isspace, texts)):
        blank = [place for place, text in enumerate(texts) if not text.strip()]
        raise _invalid_inputs(blank, "must hold more than white space")


def _refuse_answer(texts: int, model: Model) -> None:
    fit = inputs_that_fit(model.dimensions)
    if texts > fit:
        raise InvalidField.of(
            "inputs",
            f"must hold at most {fit} texts for an answer of {model.dimensions} dimensions",
        )


def _over_limit(tokens: Sequence[int], model: Model) -> InvalidField:
    places = [place for place, count in enumerate(tokens) if count > model.tokens_max]
    return _invalid_inputs(
        places, f"must be at most {model.tokens_max} tokens for this model, or set truncate"
    )


def _invalid_inputs(places: Sequence[int], description: str) -> InvalidField:
    named = [Violation(f"inputs[{place}]", description) for place in places[:_VIOLATIONS_MAX]]
    return InvalidField(f"{named[0].subject}: {description}", violations=named)
