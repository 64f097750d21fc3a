"""Which backends serve a call: the pure rules."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chassis.errors import InvalidField, ModeForbidden, NoBackend, NotFound, SpaceMismatch
from services.router.core.routes import (
    REST_S,
    Attempts,
    Backend,
    Choice,
    Health,
    Kind,
    Mode,
    Model,
    ModeSetting,
    Need,
    Route,
    Wish,
    choose,
    wished,
)

NOW = 1_000.0
ANY = Need("m")


def _backend(
    provider: str,
    kind: Kind,
    *,
    health: Health = Health.SERVING,
    models: Sequence[tuple[str, str]] | None = (("m", "space"),),
    priority: int = 0,
) -> Backend:
    route = Route("embedder", "x.E", provider, kind, "127.0.0.1:1", priority)
    told = None
    if models is not None:
        told = {name: Model(name, "words", 8, 4, space) for name, space in models}
    return Backend(route, health=health, models=told, needs_models=True)


REAL = _backend("real", Kind.REAL, models=[("m", "genuine")])
MOCK = _backend("mock", Kind.MOCK, models=[("m", "simulated"), ("mock-4", "simulated")])


def _chosen(backends: Sequence[Backend], wish: Wish, need: Need = ANY, **rest: bool) -> str:
    choice = choose(backends, wish, need, may_choose=rest.get("may_choose", False), now=NOW)
    return " ".join(backend.provider for backend in choice.able)


_backends = st.lists(
    st.builds(
        _backend,
        st.sampled_from("abcdef"),
        st.sampled_from(Kind),
        health=st.sampled_from(Health),
        models=st.one_of(
            st.none(),
            st.lists(st.tuples(st.sampled_from("mn"), st.sampled_from("st")), max_size=2),
        ),
    ),
    max_size=6,
)


@given(_backends, st.sampled_from(Mode), st.sampled_from("mn"), st.sampled_from(["", "s", "t"]))
def test_nothing_is_chosen_that_may_not_serve(
    backends: list[Backend], mode: Mode, model: str, space: str
) -> None:
    """Whatever there is, a chosen backend is able, of the mode, and has the model and the space."""
    try:
        choice = choose(backends, Wish(mode), Need(model, space), may_choose=False, now=NOW)
    except (NoBackend, NotFound, SpaceMismatch):
        return
    assert choice.able
    for backend in choice.able:
        assert backend.health in (Health.SERVING, Health.UNKNOWN)
        assert mode is Mode.HYBRID or backend.simulated == (mode is Mode.MOCK)
        assert backend.models is not None
        assert space in ("", backend.models[model].space_id)
    simulated = [backend.simulated for backend in choice.able]
    assert simulated == sorted(simulated), "genuine ones go first"


@pytest.mark.parametrize(
    ("mode", "expected"), [(Mode.REAL, "real"), (Mode.MOCK, "mock"), (Mode.HYBRID, "real mock")]
)
def test_each_mode_has_its_backends(mode: Mode, expected: str) -> None:
    """REAL has genuine backends, MOCK mock ones, and HYBRID both, the genuine ones first."""
    assert _chosen([MOCK, REAL], Wish(mode)) == expected


def test_hybrid_falls_back_and_says_from_whom() -> None:
    """With the genuine backend down an unpinned call gets the mock, and knows what was before."""
    down = _backend("real", Kind.REAL, health=Health.UNREACHABLE, models=[("m", "genuine")])
    choice = choose([down, MOCK], Wish(Mode.HYBRID), Need("m"), may_choose=False, now=NOW)
    assert [backend.provider for backend in choice.able] == ["mock"]
    assert Attempts(choice, 3).fell_back_from == ("real",)


def test_a_pinned_space_is_never_left() -> None:
    """A call that names a space waits for a backend of it, rather than get vectors of another."""
    down = _backend("real", Kind.REAL, health=Health.UNREACHABLE, models=[("m", "genuine")])
    with pytest.raises(NoBackend):
        _chosen([down, MOCK], Wish(Mode.HYBRID), Need("m", "genuine"))
    with pytest.raises(NoBackend):
        _chosen([REAL, MOCK], Wish(Mode.MOCK), Need("m", "genuine"))
    with pytest.raises(SpaceMismatch):
        _chosen([REAL, MOCK], Wish(Mode.HYBRID), Need("m", "nobody's"))


def test_a_model_that_nobody_has_is_not_found_once_all_have_told() -> None:
    """An unknown model is NOT_FOUND, unless a backend that has not told yet may have it."""
    with pytest.raises(NotFound):
        _chosen([REAL, MOCK], Wish(Mode.REAL), Need("other"))
    silent = _backend("later", Kind.REAL, models=None)
    with pytest.raises(NoBackend):
        _chosen([REAL, silent], Wish(Mode.REAL), Need("other"))


def test_a_named_provider_has_no_fallback() -> None:
    """A call that names its provider gets that one or none."""
    assert _chosen([REAL, MOCK], Wish(Mode.HYBRID, "real"), may_choose=True) == "real"
    down = _backend("real", Kind.REAL, health=Health.NOT_SERVING)
    with pytest.raises(NoBackend):
        _chosen([down, MOCK], Wish(Mode.HYBRID, "real"), may_choose=True)
    with pytest.raises(NotFound):
        _chosen([REAL, MOCK], Wish(Mode.REAL, "nobody"), may_choose=True)
    with pytest.raises(InvalidField):
        _chosen([REAL, MOCK], Wish(Mode.MOCK, "real", mode_named=True), may_choose=True)


def test_without_a_grant_only_mocks_may_be_chosen() -> None:
    """A caller without a grant may choose MOCK and mock providers, and nothing else."""
    modes = {"embedder": ModeSetting(Mode.REAL)}

    def wish(mode: str, *, may_choose: bool) -> Wish:
        return wished("embedder", modes, mode=mode, provider="", may_choose=may_choose)

    assert wish("MOCK", may_choose=False).mode is Mode.MOCK
    assert wish("real", may_choose=False).mode is Mode.REAL, "what holds anyway is no choice"
    with pytest.raises(ModeForbidden):
        wish("HYBRID", may_choose=False)
    assert wish("HYBRID", may_choose=True).mode is Mode.HYBRID
    with pytest.raises(InvalidField):
        wish("FAKE", may_choose=True)
    with pytest.raises(ModeForbidden):
        _chosen([REAL, MOCK], Wish(Mode.REAL, "real"))
    assert _chosen([REAL, MOCK], Wish(Mode.REAL, "mock")) == "mock"


@pytest.mark.parametrize(("mode", "provider"), [("MOCK", ""), ("", "mock"), ("REAL", "corpus")])
def test_the_corpus_has_no_mode_of_its_own(mode: str, provider: str) -> None:
    """A mode or provider for the corpus is refused: ignoring MOCK would spend genuine money."""
    with pytest.raises(InvalidField):
        wished("corpus", {}, mode=mode, provider=provider, may_choose=True)
    assert wished("corpus", {}, mode="", provider="", may_choose=False) == Wish(Mode.REAL)


def test_a_backend_that_could_not_be_reached_rests_for_a_moment() -> None:
    """A failed connection keeps calls away for a moment, and not for longer."""
    backend = _backend("real", Kind.REAL)
    backend.rest(NOW)
    assert not backend.can_serve(NOW)
    assert backend.can_serve(NOW + REST_S)


@given(st.integers(1, 5), st.integers(1, 8), st.lists(st.booleans(), max_size=60))
def test_attempts_end_and_are_numbered_once(count: int, most: int, fates: list[bool]) -> None:
    """Every attempt has a number of its own, and failures and skips are bounded."""
    backends = [_backend(str(n), Kind.REAL) for n in range(count)]
    attempts = Attempts(Choice(backends), most)
    numbers, failed = [], 0
    for skip in fates:
        backend = attempts.next()
        if backend is None:
            break
        numbers.append(attempts.number)
        assert backend is backends[(attempts.number - 1) % count]
        if skip:
            if not attempts.skipped():
                break
        else:
            failed += 1
            attempts.failed(backend)
    assert numbers == list(range(1, len(numbers) + 1))
    assert failed <= min(count, most)
    assert len(attempts.fell_back_from) == failed
