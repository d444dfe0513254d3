"""Why ranks stopped, and which of them stopped first: when one fails, the others lose their connections to it."""

from __future__ import annotations

import json
import socket
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass

from pipeline import storage
from pipeline.config.secrets import mask
from pipeline.telemetry.stacks import RANKS


@dataclass(frozen=True)
class Failure:
    """Why one rank stopped.

    Parameters
    ----------
    host, device
        Where it ran; the device is empty before one was chosen.
    error, traceback
        The exception in one line, and in full; secrets in them are masked. The second is empty where the exception has
        an attribute ``explained`` that is true: its message says what happened and what would be right.
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

    @classmethod
    def of_json(cls, data: bytes) -> Failure:
        """What a rank has published; a ValueError says that it is damaged."""
        try:
            return cls(**json.loads(data))
        except TypeError as error:
            raise ValueError(f"no failure of a rank: {error}") from error


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
        traceback="" if getattr(error, "explained", False) else mask("".join(traceback.format_exception(error))),
        echo=echo,
        time=time.time(),
        device=device,
        where=where,
        final=getattr(error, "final", False),
    )


def failure_path(folder: str, attempt: str) -> str:
    """The file beside the heartbeats in which the first rank of an attempt that fails publishes its failure."""
    return storage.join(folder, RANKS, f"failure-{attempt}.json")


def join_name(launch: str, rank: int | str) -> str:
    """What the failure of a rank that could not join the others is called, in the place of an attempt."""
    return f"joining-{launch}-{rank}"


def read_join_failure(folder: str, launch: str) -> Failure | None:
    """The first failure of the ranks of a launch that could not join the others; None where none is to be read."""
    prefix = failure_path("", join_name(launch, "")).rpartition("/")[2].removesuffix(".json")
    try:
        with storage.retry_for(0):
            names = [name for name in storage.names(storage.join(folder, RANKS)) if name.startswith(prefix)]
            found = storage.read_many([storage.join(folder, RANKS, name) for name in names])
        return first_of([Failure.of_json(data) for data in found if isinstance(data, bytes)])
    except (OSError, ValueError):  # also of no failure at all
        return None


def first_of(failures: Sequence[Failure]) -> Failure:
    """The earliest failure that is no echo."""
    return min(failures, key=lambda failure: (failure.echo, failure.time))


def headline(failure: Failure, *, also: str = "") -> str:
    """A failure in one line: rank, host, device, what the rank was doing, and the exception."""
    device = f" ({failure.device})" if failure.device else ""
    where = f" in {failure.where}" if failure.where else ""
    return f"rank {failure.rank} on {failure.host}{device}{also}{where}: {failure.error}"


def describe(failures: Sequence[Failure]) -> str:
    """The first failure that is no echo, in full; equal failures of other ranks are only counted."""
    first = first_of(failures)
    others = [failure.rank for failure in failures if not failure.echo and failure.rank != first.rank]
    also = f" (also on ranks {sorted(others)})" if others else ""
    return f"{headline(first, also=also)}\n{first.traceback}".rstrip()
