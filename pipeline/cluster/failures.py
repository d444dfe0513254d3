"""Why ranks stopped, and which of them stopped first: when one fails, the others lose their connections to it."""

from __future__ import annotations

import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.config.secrets import mask
from pipeline.telemetry.heartbeat import RANKS


@dataclass(frozen=True)
class Failure:
    """Why one rank stopped.

    Parameters
    ----------
    host, device
        Where it ran; the device is empty before one was chosen.
    error, traceback
        The exception in one line, and in full; secrets in them are masked.
    echo
        Whether it is the broken connection that another rank's failure left behind.
    time
        When it was noticed, in seconds since the epoch.
    where
        What the rank was doing.
    final
        Whether the exception has an attribute ``final`` that is true: it would be raised again.
    """

    rank: int
    host: str
    error: str
    traceback: str
    echo: bool
    time: float
    device: str = ""
    where: str = ""
    final: bool = False


class FailedError(Exception):
    """Carries a rank's failure to where it becomes a row of the stage."""

    def __init__(self, failure: Failure):
        super().__init__(failure.error)
        self.failure = failure


class GangBrokenError(RuntimeError):
    """The ranks did not find together, or rank 0 died: this task fails, so that Spark starts the whole gang anew."""


def failure_from(error: BaseException, *, rank: int, device: str, where: str, echo: bool) -> Failure:
    """The failure of this process's rank that an exception stands for."""
    return Failure(
        rank=rank,
        host=socket.gethostname(),
        error=mask(f"{type(error).__name__}: {error}"),
        traceback=mask("".join(traceback.format_exception(error))),
        echo=echo,
        time=time.time(),
        device=device,
        where=where,
        final=getattr(error, "final", False),
    )


def failure_path(folder: str, attempt: str) -> str:
    """The file beside the heartbeats in which the first rank of an attempt that fails publishes its failure."""
    return storage.join(folder, RANKS, f"failure-{attempt}.json")


def first_of(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is no echo."""
    return min(failures, key=lambda failure: (failure.echo, failure.time))


def describe(failures: Sequence[Failure]) -> str:
    """The first failure that is no echo, in full; equal failures of other ranks are only counted."""
    first = first_of(failures)
    others = [failure.rank for failure in failures if not failure.echo and failure.rank != first.rank]
    also = f" (also on ranks {sorted(others)})" if others else ""
    device = f" ({first.device})" if first.device else ""
    where = f" in {first.where}" if first.where else ""
    return f"rank {first.rank} on {first.host}{device}{also}{where}: {first.error}\n{first.traceback.rstrip()}"
