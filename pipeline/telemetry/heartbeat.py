"""What a rank is doing, published every second or, on remote storage, every ten, and its stack where it hangs.

The training loop says where it is (`Status.enter`, one assignment); a thread publishes that as a small file that is
overwritten. On remote storage the driver is told instead, where it can be reached (`driver_link.py`). The first beats
come there as often as on a mounted path, and then fewer; each says when the next one is due, so that nobody takes a
rank that is well for silent. If the position does not change for ``stall_seconds``, the stacks of all threads are
dumped (`stacks.py`). The driver takes the beats up (`watch.py`) and decides.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.telemetry.driver_link import DriverAddress, DriverLink
from pipeline.telemetry.stacks import RANKS, Stacks

log = logging.getLogger(__name__)

# What a rank can be in, in the order of one step.
PHASES = ("start", "restore", "data loading", "forward", "backward", "all-reduce", "optimizer step", "diagnostics",
          "evaluation", "checkpoint", "end")  # fmt: skip
# Exit code of a process whose gang was replaced by a newer one.
SUPERSEDED = 75
# Between two beats on remote storage: this share of ``stall_seconds``, and so many seconds, at most. A stall is seen by
# what the last beat says and its age, so it is noticed no later; only that a rank is silent is.
_LONGEST_SHARE, _LONGEST_SECONDS = 1 / 18, 10.0
_LAST_BEAT_SECONDS = 5.0  # how long the beat that says that a rank has ended is tried again


class Position(NamedTuple):
    """Where a rank is in its training.

    phase : one of `PHASES`
    epoch, step : the epoch under way, and optimizer steps done
    since : time.monotonic() at which it began, in seconds
    waits : whether it waits for the other ranks, having done its own part of the phase
    """

    phase: str = "start"
    epoch: int = 0
    step: int = 0
    since: float = 0.0
    waits: bool = False

    def __str__(self) -> str:
        return f"{self.phase}, epoch {self.epoch}, step {self.step}"


class Status:
    """Where a rank is. Written by the training loop, read by the heartbeat and by whoever reports an error."""

    def __init__(self) -> None:
        self.position = Position(since=time.monotonic())

    def enter(self, phase: str, *, epoch: int | None = None, step: int | None = None) -> None:
        """Say that the rank begins a phase, or gets on in the one it is in; None leaves epoch or step as they are."""
        now = self.position
        self.position = Position(
            phase, now.epoch if epoch is None else epoch, now.step if step is None else step, time.monotonic()
        )

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Say that the rank waits for the others: if one of them hangs in this phase, it is not this one."""
        self.position = self.position._replace(waits=True)
        try:
            yield
        finally:
            self.position = self.position._replace(waits=False)


@dataclass(frozen=True)
class Attempt:
    """One gang that was started for a job.

    number : counts them from 1, over restarts of Spark and of the driver
    id : unique
    """

    number: int
    id: str


def next_attempt(folder: str) -> Attempt:
    """Publish a new attempt in the folder of a job; a gang of an older one ends itself when it sees it."""
    before = read_attempt(folder)
    return _publish_attempt(folder, (before.number if before else 0) + 1)


def end_attempt(folder: str) -> None:
    """Have the gang of the newest attempt end itself, though no other has begun: its driver is replaced by another."""
    if before := read_attempt(folder):
        _publish_attempt(folder, before.number)


def _publish_attempt(folder: str, number: int) -> Attempt:
    attempt = Attempt(number, uuid.uuid4().hex)
    path = storage.join(folder, "attempt.json")
    storage.publish(path, json.dumps({"number": attempt.number, "id": attempt.id}).encode())
    return attempt


def read_attempt(folder: str) -> Attempt | None:
    """The newest attempt; None where there is none, or its file is damaged."""
    try:
        return Attempt(**json.loads(storage.read_bytes(storage.join(folder, "attempt.json"))))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def beat_path(folder: str, rank: int) -> str:
    """Where a rank of the job with this folder publishes its heartbeat."""
    return storage.join(folder, RANKS, beat_name(rank))


def beat_name(rank: int) -> str:
    """The name of the file of a rank's heartbeats."""
    return f"rank-{rank:05d}.json"


class RankProcess(FrozenModel):
    """Which process a rank is: its process number on its host, and its device as torch names it ("cuda:1")."""

    rank: int
    world_size: int
    host: str
    pid: int
    device: str


class Beat(RankProcess):
    """One heartbeat: which process a rank is, and where it is in its training.

    attempt : id of the gang that the rank belongs to
    phase, epoch, step, waits : see `Position`
    for_seconds : since when it is there, by its own clock
    time : of the beat, in seconds since 1970, by the clock of its host
    ended : whether the rank has ended, well or not
    next_seconds : after which the next beat is due
    number : counts the beats of this process, which may come by two ways
    stack : stacks of its threads where it does not get on and the driver cannot read them from a file
    """

    attempt: str
    phase: str
    epoch: int
    step: int
    waits: bool
    for_seconds: float
    time: float
    ended: bool
    next_seconds: float = 0.0
    number: int = 0
    stack: str = ""


def read_beat(folder: str, rank: int) -> Beat:
    """The newest heartbeat of a rank.

    Raises
    ------
    FileNotFoundError
        It has given none.
    ValueError
        The file is damaged.
    """
    return Beat.model_validate_json(storage.read_bytes(beat_path(folder, rank)))


class Heartbeat:
    """Publishes the status of one rank while its ``with`` block runs.

    Parameters
    ----------
    folder : of the job, seen by all ranks and the driver
    status : what the training of this rank writes
    attempt : that the rank belongs to; its process ends itself when it sees a newer one
    process : of this rank
    seconds : between two beats; on remote storage between the first two, and then twice as many each time
    stall_seconds : without a new position for this long, stacks are dumped
    driver : is told instead of storage while it can be reached; None where it does not listen
    """

    def __init__(
        self,
        folder: str,
        status: Status,
        attempt: Attempt,
        process: RankProcess,
        *,
        seconds: float,
        stall_seconds: float,
        driver: DriverAddress | None = None,
    ):
        self._folder, self._status, self._attempt, self._process = folder, status, attempt, process
        self._driver, self._number = DriverLink(driver), 0
        self._seconds = seconds
        self._next_seconds = self._longest_seconds = seconds
        if not storage.is_local(folder):
            self._longest_seconds = max(seconds, min(_LONGEST_SECONDS, _LONGEST_SHARE * stall_seconds))
        self._due_at = 0.0  # next_seconds after the beat before, and longest_seconds at most
        self._stacks = Stacks(folder, process.rank, stall_seconds)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="sparknorm-heartbeat", daemon=True)
        self._missed = False  # the last beat

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Publish a beat now, one whenever it is due, and a last one that says that the rank has ended."""
        with self._stacks.watching():
            self._try_to_beat()
            self._thread.start()
            try:
                yield
            finally:
                self._stop.set()
                self._thread.join(timeout=5)
                with contextlib.suppress(Exception), storage.retry_for(_LAST_BEAT_SECONDS):
                    self._publish(ended=True)  # the error that ends the block is the one to show

    def _loop(self) -> None:
        while not self._stop.wait(self._seconds):
            self._try_to_beat()

    def _try_to_beat(self) -> None:
        """One beat, if it is due. That it is missed is no reason to end a training: the next one is soon."""
        try:
            since = self._status.position.since
            self._stacks.watch(since)
            if time.monotonic() < self._due_at and not self._stacks.is_new(since):
                return
            with storage.retry_for(0):
                self._beat()
            self._due_at = time.monotonic() + self._next_seconds - self._seconds / 2  # of the looks, the nearest one
            self._next_seconds = min(2 * self._next_seconds, self._longest_seconds)
            self._missed = False
        except Exception as error:  # noqa: BLE001
            if not self._missed:
                log.warning("a heartbeat could not be published: %s", error)
            self._missed = True

    def _beat(self) -> None:
        newest = read_attempt(self._folder)
        if newest is not None and newest.id != self._attempt.id:
            # Spark or the driver gave this gang up, and another trains in its place: nothing here may be published.
            sys.stderr.write(f"attempt {self._attempt.number} was replaced: this worker ends\n")
            sys.stderr.flush()
            os._exit(SUPERSEDED)
        self._publish()

    def _publish(self, *, ended: bool = False) -> None:
        position = self._status.position
        self._number += 1
        beat = Beat(
            **dict(self._process),
            attempt=self._attempt.id,
            phase=position.phase,
            epoch=position.epoch,
            step=position.step,
            waits=position.waits,
            for_seconds=time.monotonic() - position.since,
            time=time.time(),
            ended=ended,
            next_seconds=self._next_seconds,
            number=self._number,
        )
        if stack := self._stacks.to_tell(position.since):
            beat = beat.model_copy(update={"stack": stack})
        text = json.dumps(beat.model_dump(exclude_unset=True))
        if not self._driver.tell(text):
            storage.publish(beat_path(self._folder, beat.rank), text.encode(), durable=False)
        if beat.stack:
            self._stacks.told(position.since)
