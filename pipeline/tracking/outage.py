"""A tracking server that is down: how it is told from one that refuses, and how long it is waited for."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TypeVar

log = logging.getLogger(__name__)

# Between two tries.
AGAIN_SECONDS = 1.0

Answer = TypeVar("Answer")


class TrackingError(RuntimeError):
    """The tracking store cannot be used."""


class RefusedError(TrackingError):
    """The tracking store answers, and does not take the call: to try again is no use."""


def is_outage(error: BaseException) -> bool:
    """Whether the store, or the way to it, is down: the same call may succeed later. False if it refuses the call."""
    status = getattr(error, "get_http_status_code", None)  # an MlflowException; only tracking.py imports MLflow
    if status is not None:
        return status() >= 500 or status() in (408, 429)
    return isinstance(error, OSError)


def reason(error: BaseException) -> str:
    """An error of MLflow's in one line of at most 300 characters, the innermost cause if it names one."""
    text = " ".join(str(error).split())
    return (text.partition("(Caused by ")[2] or text)[:300] or type(error).__name__


def patiently(what: str, call: Callable[[], Answer], seconds: float) -> Answer:
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
    give_up_at: float | None = None
    while True:
        try:
            return call()
        except Exception as error:
            if not is_outage(error):
                if hasattr(error, "get_http_status_code"):
                    raise RefusedError(f"MLflow refuses to {what}: {reason(error)}") from error
                raise
            if give_up_at is None:
                give_up_at = time.monotonic() + seconds
                if seconds:
                    log.warning("MLflow cannot %s now, waiting up to %g s for it: %s", what, seconds, reason(error))
            if time.monotonic() >= give_up_at:
                waited = f"within tracking.outage_seconds = {seconds:g}"
                raise TrackingError(f"MLflow could not {what} {waited}: {reason(error)}") from error
        time.sleep(AGAIN_SECONDS)
