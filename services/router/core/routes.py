"""Modes, backends, and which of them serve a call: pure, over a snapshot, in microseconds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from itertools import cycle
from statistics import median

from chassis.errors import (
    InvalidField,
    ModeForbidden,
    NoBackend,
    NotFound,
    SpaceMismatch,
    Violation,
)

# Services whose backends come in genuine and mock. The corpus spends only through the others.
MODAL_SERVICES = ("parser", "embedder", "storage")

_LATENCIES = 128
# How long a backend that could not be reached is left alone, unless its health says more.
REST_S = 1.0
# Attempts of earlier calls under the same call id that may be skipped, each known as not billed.
_SKIPPED_MAX = 16


class Mode(StrEnum):
    """Which backends of a service may serve."""

    MOCK = "MOCK"
    REAL = "REAL"
    HYBRID = "HYBRID"


class Kind(StrEnum):
    """Whether a backend does the work or simulates it."""

    REAL = "REAL"
    MOCK = "MOCK"


class Health(StrEnum):
    """What is known of a backend."""

    UNKNOWN = "UNSPECIFIED"
    SERVING = "SERVING"
    NOT_SERVING = "NOT_SERVING"
    UNREACHABLE = "UNREACHABLE"


@dataclass(frozen=True, slots=True)
class ModeSetting:
    """A mode, and since when and by whom; unset while it is the one from the settings."""

    mode: Mode
    set_at: datetime | None = None
    set_by: str = ""


Modes = Mapping[str, ModeSetting]


@dataclass(frozen=True, slots=True)
class Model:
    """What a backend says of a model of its own. `tokens_max` is per text."""

    name: str
    tokenizer: str
    tokens_max: int
    dimensions: int
    space_id: str


@dataclass(frozen=True, slots=True)
class Route:
    """One provider of one gRPC service at one address; the lower the priority, the earlier."""

    service: str
    """The room: parser, embedder, storage or corpus."""
    grpc_service: str
    """The full name, such as `tollgate.storage.v1.ObjectService`."""
    provider: str
    kind: Kind
    address: str
    priority: int = 0

    @property
    def health_name(self) -> str:
        """Under what its daemon tells its health: the corpus is one, others have providers."""
        if self.service not in MODAL_SERVICES:
            return self.grpc_service
        return f"{self.grpc_service}/{self.provider}"


@dataclass(slots=True, eq=False)
class Backend:
    """A route and how it fares. Only the event loop writes it."""

    route: Route
    health: Health = Health.UNKNOWN
    rests_until: float = 0.0
    models: Mapping[str, Model] | None = None
    """By name, where the service has models and the backend has told them."""
    needs_models: bool = False
    in_flight: int = 0
    calls: int = 0
    failures: int = 0
    _latencies_s: deque[float] = field(default_factory=lambda: deque(maxlen=_LATENCIES))

    @property
    def provider(self) -> str:
        return self.route.provider

    @property
    def simulated(self) -> bool:
        return self.route.kind is Kind.MOCK

    @property
    def latency_s(self) -> float:
        """The median of recent calls; 0 before the first."""
        return median(self._latencies_s) if self._latencies_s else 0.0

    def can_serve(self, now: float) -> bool:
        """Whether it is worth asking: healthy or not yet known, not resting, its models known."""
        return (
            self.health in (Health.SERVING, Health.UNKNOWN)
            and now >= self.rests_until
            and not (self.needs_models and self.models is None)
        )

    def began(self) -> None:
        self.in_flight += 1
        self.calls += 1

    def ended(self, took_s: float, *, failed: bool) -> None:
        self.in_flight -= 1
        self.failures += failed
        self._latencies_s.append(took_s)

    def rest(self, now: float) -> None:
        """Leave it alone for a moment: it could not be reached."""
        self.rests_until = now + REST_S


@dataclass(frozen=True, slots=True)
class Wish:
    """Which backends a call may have: those of its mode, or the one provider that it names."""

    mode: Mode
    provider: str = ""
    mode_named: bool = False
    """Whether the call itself chose the mode."""


def wished(service: str, modes: Modes, *, mode: str, provider: str, may_choose: bool) -> Wish:
    """What a call gets of what it asks for (`tollgate-mode`, `tollgate-provider`).

    Raises InvalidField for an unknown mode and ModeForbidden for a mode that is not the caller's
    to choose. A named provider is checked by `choose`, which knows what it is.
    """
    standing = modes[service].mode if service in modes else Mode.REAL
    if service not in MODAL_SERVICES:
        if mode or provider:
            # Ignoring it could spend genuine money where the caller asked for a mock.
            field = "tollgate-mode" if mode else "tollgate-provider"
            raise InvalidField.of(field, f"cannot be chosen for the {service}: it has none")
        return Wish(Mode.REAL)
    if not mode:
        return Wish(standing, provider)
    try:
        chosen = Mode(mode.upper())
    except ValueError:
        raise InvalidField.of("tollgate-mode", "must be MOCK, REAL or HYBRID") from None
    if chosen not in (Mode.MOCK, standing) and not may_choose:
        raise ModeForbidden(f"without a grant a call may choose MOCK only, not {chosen}")
    return Wish(chosen, provider, mode_named=True)


@dataclass(frozen=True, slots=True)
class Need:
    """What a call needs of a backend: a model, and the space that its vectors must be in."""

    model: str = ""
    space_id: str = ""


NOTHING = Need()


@dataclass(frozen=True, slots=True)
class Choice:
    """The backends to try, in order, never none; and those before them that cannot serve now."""

    able: Sequence[Backend]
    passed_over: Sequence[Backend] = ()


def choose(
    backends: Sequence[Backend], wish: Wish, need: Need, *, may_choose: bool, now: float
) -> Choice:
    """The backends to try.

    Raises NoBackend where none can serve now, NotFound (provider, model), SpaceMismatch where no
    backend has the pinned space, ModeForbidden where the named provider is not the caller's to
    choose. `backends` are those of one gRPC service in order of priority.
    """
    eligible = _named(backends, wish, may_choose) if wish.provider else _of_mode(backends, wish)
    fitting = [backend for backend in eligible if _fits(backend, need)]
    able = [backend for backend in fitting if backend.can_serve(now)]
    if not able:
        if need.model or need.space_id:
            _refuse_need(eligible, eligible if wish.provider else backends, need)
        raise NoBackend("no backend can serve this call now")
    if able[0] is eligible[0]:
        return Choice(able)
    before = eligible[: eligible.index(able[0])]
    return Choice(able, [backend for backend in before if _might_fit(backend, need)])


def _might_fit(backend: Backend, need: Need) -> bool:
    """Whether it has what the call needs, or may have but has not told."""
    return _fits(backend, need) or (backend.needs_models and backend.models is None)


def _of_mode(backends: Sequence[Backend], wish: Wish) -> list[Backend]:
    if wish.mode is Mode.HYBRID:
        # Genuine ones first, whatever the priorities say.
        return sorted(backends, key=lambda backend: backend.simulated)
    return [backend for backend in backends if backend.simulated == (wish.mode is Mode.MOCK)]


def _named(backends: Sequence[Backend], wish: Wish, may_choose: bool) -> list[Backend]:
    named = [backend for backend in backends if backend.provider == wish.provider]
    if not named:
        raise NotFound(
            "no such provider", violations=[Violation(f"provider/{wish.provider}", "unknown")]
        )
    if wish.mode_named and not (named := _of_mode(named, wish)):
        raise InvalidField.of("tollgate-provider", f"is not one of mode {wish.mode}")
    if not may_choose and not all(backend.simulated for backend in named):
        raise ModeForbidden("without a grant a call may name a mock provider only")
    return named


def _fits(backend: Backend, need: Need) -> bool:
    """Whether it has what the call needs, as far as it has told."""
    if not need.model and not need.space_id:
        return True
    model = (backend.models or {}).get(need.model)
    if model is None:
        return False
    return not need.space_id or model.space_id == need.space_id


def _refuse_need(eligible: Sequence[Backend], known: Sequence[Backend], need: Need) -> None:
    """Say that nobody can meet the need, where every backend has told what it has.

    A space that a backend of another mode has is not refused: its time may come again.
    """
    if any(backend.models is None for backend in (*eligible, *known)):
        return  # One that has not told may have it.
    if not any(_fits(backend, Need(need.model)) for backend in eligible):
        raise NotFound(
            "no such model; ListModels has them",
            violations=[Violation(f"model/{need.model[:128]}", "no backend of this mode has it")],
        )
    if not any(_fits(backend, need) for backend in known):
        raise SpaceMismatch(
            "no backend has this model in the space that the call names",
            violations=[Violation("space_id", "no backend has it")],
        )


class Attempts:
    """The attempts at one call: which backend, and under which number.

    Numbers go up from 1 with every attempt, so that each has a hold id of its own. Every candidate
    is asked once, and `attempts_max` of them at the most; an attempt that an earlier call under the
    same call id has made in vain is skipped, and its backend has its turn again after the others.
    """

    def __init__(self, choice: Choice, attempts_max: int) -> None:
        self._left = min(len(choice.able), attempts_max)
        self._skips = _SKIPPED_MAX
        self._backends: Iterator[Backend] = cycle(choice.able)
        self._unable = [backend.provider for backend in choice.passed_over]
        self.number = 0

    def next(self) -> Backend | None:
        """The next backend to ask; None when there is none left."""
        if not self._left:
            return None
        self._left -= 1
        self.number += 1
        return next(self._backends)

    def skipped(self) -> bool:
        """The attempt was made before, and was not billed. Whether there may be another."""
        self._left += 1
        self._skips -= 1
        return self._skips > 0

    def failed(self, backend: Backend) -> None:
        """The attempt failed and was not billed."""
        self._unable.append(backend.provider)

    @property
    def fell_back_from(self) -> tuple[str, ...]:
        """The providers that come before and could not serve, in order."""
        return tuple(self._unable)
