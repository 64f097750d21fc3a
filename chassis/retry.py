"""The one policy of retrying: exponential with jitter, honouring what the refusal asked for."""

from __future__ import annotations

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_random_exponential,
)

from chassis.errors import TollgateError, Unavailable

WAIT_MAX_S = 5.0

_backoff = wait_random_exponential(multiplier=0.1, max=WAIT_MAX_S)


def _wait(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after_s if isinstance(error, TollgateError) else None
    # No sooner than asked, up to a bound: a peer that asks for minutes may be back in seconds.
    return max(_backoff(state), min(asked or 0.0, WAIT_MAX_S))


def retrying(attempts: int, *, for_s: float | None = None) -> AsyncRetrying:
    """Retry what raises Unavailable, at most `attempts` times and, if given, for at most `for_s`.

    Use as `async for attempt in retrying(3): with attempt: …`; the last error is raised as it was.
    """
    stop = stop_after_attempt(attempts)
    return AsyncRetrying(
        stop=stop | stop_after_delay(for_s) if for_s is not None else stop,
        wait=_wait,
        retry=retry_if_exception_type(Unavailable),
        reraise=True,
    )
