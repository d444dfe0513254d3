"""A tracking server that is down: how it is told from one that refuses, and how long it is waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, wait_fixed
from tenacity.stop import stop_base

from pipeline.config.secrets import mask

log = logging.getLogger(__name__)

# Between two tries.
AGAIN_SECONDS = 1.0

Answer = TypeVar("Answer")


class TrackingError(RuntimeError):
    """The tracking store cannot be used."""


class RefusedError(TrackingError):
    """The tracking store answers, and does not take the call: to try again is no use."""


class NotOwnerError(TrackingError):
    """Another process goes on with the run: this one leaves it as it is."""


def is_outage(error: BaseException) -> bool:
    """Whether the store, or the way to it, is down: the same call may succeed later. False if it refuses the call."""
    status = getattr(error, "get_http_status_code", None)  # an MlflowException; only its raisers import MLflow
    if status is not None:
        return status() >= 500 or status() in (408, 429)
    return isinstance(error, OSError)


def reason(error: BaseException) -> str:
    """An error of MLflow's in one line of at most 300 characters, masked; the innermost cause if it names one."""
    text = " ".join(mask(str(error)).split())
    return (text.partition("(Caused by ")[2] or text)[:300] or type(error).__name__


def retry_during_outage(what: str, call: Callable[[], Answer], seconds: float) -> Answer:
    """The result of ``call``, made again while the store is down: for at most ``seconds``, and one call more.

    Parameters
    ----------
    what
        What the call does, for messages: "log params".
    seconds
        The setting ``tracking.outage_seconds``.

    Raises
    ------
    TrackingError
        The store is still down; a RefusedError if it refuses the call. The store's own error is its cause.
    """

    def warn_once(state: RetryCallState) -> None:
        if state.attempt_number == 1:
            log.warning("MLflow cannot %s now, waiting up to %g s for it: %s", what, seconds, reason(_error_of(state)))

    again = Retrying(
        retry=retry_if_exception(is_outage),
        stop=_StopAfterOutage(seconds),
        wait=wait_fixed(AGAIN_SECONDS),
        before_sleep=warn_once,
        reraise=True,
    )
    try:
        return again(call)
    except Exception as error:
        if is_outage(error):
            waited = f"within tracking.outage_seconds = {seconds:g}"
            raise TrackingError(f"MLflow could not {what} {waited}: {reason(error)}") from error
        if hasattr(error, "get_http_status_code"):
            raise RefusedError(f"MLflow refuses to {what}: {reason(error)}") from error
        raise


class _StopAfterOutage(stop_base):
    """Stops when an outage has lasted this long: tenacity would count from the start of the first call, which may
    itself take minutes to fail.
    """

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._began_at: float | None = None

    def __call__(self, state: RetryCallState) -> bool:
        now = time.monotonic()
        if self._began_at is None:
            self._began_at = now
        return now - self._began_at >= self._seconds


def _error_of(state: RetryCallState) -> BaseException:
    error = state.outcome.exception() if state.outcome else None
    assert error is not None, "only what failed is tried again"
    return error
