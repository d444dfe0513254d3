"""The driver's watch over a gang: whether it runs, whether every rank makes progress, and if not, which one and where.

It reads the heartbeats that ranks publish (`heartbeat.py`) and never compares clocks of two machines: a rank says how
long it has been in its phase, and how old a heartbeat is counts from when this process saw it change.

One listing tells which files are new, whatever the number of ranks, and those alone are read, several at once. On
remote storage it looks as often as the ranks publish, which says each of their beats. Ranks that reach the driver tell
it, and leave storage alone (`telemetry.driver_link`).
"""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from pipeline import storage
from pipeline.cluster.failures import Failure, failure_path
from pipeline.config.cluster import WorkerSettings
from pipeline.telemetry import heartbeat
from pipeline.telemetry.stacks import RANKS, stack_path

log = logging.getLogger(__name__)

# A rank whose heartbeat is this many beats old is taken for gone or frozen; or this many times older than the next one
# was due in, where that is more: on remote storage a beat may come late by one, and be seen late by another.
MISSED_BEATS, MISSED_INTERVALS = 5, 2.5
# A rank that has told its last beat so many times longer ago than the next was due in may write into storage by now.
_LATE_INTERVALS = 1.3
# How long the other ranks may need to notice that one has failed. They need not: a rank on a GPU waits in a kernel of
# NCCL, and one in native code looks at no connection.
FAILURE_GRACE_SECONDS, FAILURE_GRACE_BEATS = 5.0, 4
# Between two looks at remote storage while no rank has given a sign of life, and when one has failed.
_FIRST_LOOK_SECONDS, _LAUNCH_LOOK_SECONDS = 0.7, 2.0
# How long a stack dump may need to arrive.
STACK_SECONDS = 5.0


@dataclass
class _RankView:
    """The newest heartbeat of one rank, when this process saw it first (time.monotonic), and whether it was told it."""

    beat: heartbeat.Beat
    seen_at: float
    told: bool = False

    @property
    def age_seconds(self) -> float:
        return time.monotonic() - self.seen_at

    @property
    def stuck_seconds(self) -> float:
        """Seconds without progress, as far as this process can know."""
        return self.beat.for_seconds + self.age_seconds

    @property
    def progress(self) -> tuple[int, int, bool]:
        """How far the rank has come, to be compared with other ranks."""
        phase = self.beat.phase
        number = heartbeat.PHASES.index(phase) if phase in heartbeat.PHASES else 0
        return self.beat.step, number, self.beat.waits

    def __str__(self) -> str:
        beat = self.beat
        return f"rank {beat.rank} on {beat.host} in {beat.phase} at step {beat.step}"


class Watch:
    """Reads the heartbeats in the folder of a job and says what they mean.

    `read_heartbeats` is to be called often; the other methods speak of what the last call read.

    Attributes
    ----------
    folder : of the job
    stall_name : what messages call ``workers.stall_seconds``, which need not be what the user has set
    """

    def __init__(self, folder: str, workers: WorkerSettings, stall_name: str = "workers.stall_seconds"):
        self.folder, self.stall_name, self._workers = folder, stall_name, workers
        self._earlier_attempt = heartbeat.read_attempt(folder)  # of an earlier launch: not ours
        self._attempt = ""
        self._ranks: dict[int, _RankView] = {}
        self._failure: Failure | None = None
        self._failure_seen_at: float | None = None
        self._life_seen_at = self._looked_at = time.monotonic()
        self._heard: deque[_RankView] = deque()  # told directly, and not taken up yet
        self._versions: dict[str, str] = {}  # of the files that were read
        self._is_local = storage.is_local(folder)
        self._look_at, self._look_seconds = 0.0, _FIRST_LOOK_SECONDS

    def hear(self, text: str) -> None:
        """Keep a beat that a rank has told directly, from any thread; `read_heartbeats` takes it up.

        Raises
        ------
        ValueError
            It is none.
        """
        self._heard.append(_RankView(heartbeat.Beat.model_validate_json(text), time.monotonic(), told=True))

    def read_heartbeats(self, *, now: bool = False) -> None:
        """Take up what was told, and read what is new: if it is time for that on remote storage, or ``now``.

        Storage errors are raised at once; the caller may ignore them, and call again.
        """
        with storage.retry_for(0):
            while self._heard:
                self._take_beat(self._heard[0])
                self._heard.popleft()
        if not (now or self._is_local) and time.monotonic() < self._look_at:
            return
        try:
            with storage.retry_for(0):
                self._read_new_files()
            self._looked_at = time.monotonic()
        finally:
            self._look_at = time.monotonic() + self._next_look_seconds()

    def _next_look_seconds(self) -> float:
        """As often as the ranks publish; often, but less and less, before they do, and when one has failed."""
        running = [self._interval(rank) for rank in self._ranks.values() if not rank.beat.ended]
        if running and self._failure_seen_at is None:
            return min(running)
        self._look_seconds = min(1.5 * self._look_seconds, _LAUNCH_LOOK_SECONDS)
        return self._look_seconds

    def _read_new_files(self) -> None:
        """Read what has changed in the folder of the ranks. What cannot be read now is read at the next look."""
        folder = storage.join(self.folder, RANKS)
        # Where all tell, nothing is to be listed; and a folder without files takes S3's driver two requests.
        all_tell = self._all_ranks_tell()
        versions = {} if all_tell else storage.versions(folder)
        overdue = {
            heartbeat.beat_name(rank)
            for rank, view in self._ranks.items()
            if not view.beat.ended and view.age_seconds > 2 * self._interval(view)  # a listing may be behind, or coarse
        }
        ours = {heartbeat.beat_name(rank) for rank in range(self._workers.count)}
        names = [n for n, v in versions.items() if n in ours and (self._versions.get(n) != v or n in overdue)]
        failed = failure_path("", self._attempt).rpartition("/")[2]
        if self._attempt and self._failure is None and (all_tell or failed in versions):
            names.append(failed)
        problem: OSError | None = None
        for name, data in zip(names, storage.read_many([storage.join(folder, n) for n in names]), strict=True):
            try:
                self._take(name, data)
                self._versions[name] = versions.get(name, "")
            except FileNotFoundError:
                continue
            except OSError as error:
                problem = error
            except ValueError as error:  # that rank is taken for silent, if the file is not written again
                log.debug("%s in %s is damaged: %s", name, folder, error)
        if problem is not None:
            raise problem

    def _all_ranks_tell(self) -> bool:
        """Whether every rank has told this process how it is, the last time and not long ago."""
        views = self._ranks.values()
        return len(views) == self._workers.count and all(
            view.told and (view.beat.ended or view.age_seconds <= _LATE_INTERVALS * self._interval(view))
            for view in views
        )

    def _take(self, name: str, data: bytes | Exception) -> None:
        """Take up one file that was read; raises what reading it raised, and ValueError where it is damaged."""
        if isinstance(data, Exception):
            raise data
        if not name.startswith("rank-"):
            self._failure = Failure.of_json(data)
            return
        self._take_beat(_RankView(heartbeat.Beat.model_validate_json(data), time.monotonic()))

    def _take_beat(self, view: _RankView) -> None:
        """Take up a beat of the newest attempt, unless one that was given later is known: they come by two ways."""
        beat = view.beat
        if beat.attempt != self._attempt and not self._is_of_newest_attempt(beat):
            return
        known = self._ranks.get(beat.rank)
        if known is None or (known.beat.time != beat.time and known.beat.number <= beat.number):
            self._ranks[beat.rank] = view

    def _is_of_newest_attempt(self, beat: heartbeat.Beat) -> bool:
        """Whether a beat of another attempt than the one that was watched is of the newest; that is then watched."""
        newest = heartbeat.read_attempt(self.folder)
        if newest is None or beat.attempt != newest.id:
            return False
        if self._earlier_attempt is not None and newest.id == self._earlier_attempt.id:
            return False
        self._attempt, self._failure, self._failure_seen_at = newest.id, None, None
        self._ranks.clear()
        self._look_seconds = _FIRST_LOOK_SECONDS
        return True

    def _interval(self, rank: _RankView) -> float:
        """Seconds between two beats of a rank, as its last one says."""
        return max(self._workers.heartbeat_seconds, rank.beat.next_seconds)

    def _is_silent(self, rank: _RankView) -> bool:
        limit = max(MISSED_BEATS * self._workers.heartbeat_seconds, MISSED_INTERVALS * rank.beat.next_seconds)
        return rank.age_seconds > limit

    @property
    def silent_seconds(self) -> float:
        """Seconds since any rank of the newest attempt gave a sign of life: the stage waits, restarts, or ends."""
        if self._any_rank_runs():
            self._life_seen_at = time.monotonic()
        return time.monotonic() - self._life_seen_at

    @property
    def blind_seconds(self) -> float:
        """Seconds since the folder could last be read, where looks at it fail."""
        return time.monotonic() - self._looked_at

    def positions(self) -> str:
        """Where each rank was last seen; empty before the first sign of life."""
        return "; ".join(f"{rank}, {rank.age_seconds:.0f} s ago" for _, rank in sorted(self._ranks.items()))

    def stall(self) -> str | None:
        """The message about the rank that holds all others up for longer than ``stall_seconds``, or None."""
        limit = self._workers.stall_seconds
        running = [rank for rank in self._ranks.values() if not rank.beat.ended]
        if not self._any_rank_runs() or not any(rank.stuck_seconds > limit for rank in running):
            return None
        # Those that wait for others are further on than the one they wait for.
        least = min(rank.progress for rank in running)
        culprit = max((rank for rank in running if rank.progress == least), key=lambda rank: rank.stuck_seconds)
        told, stack = self._describe(culprit), self._stack(culprit.beat.rank)
        return f"{told}\n{stack}" if stack is not None else None

    def _describe(self, culprit: _RankView) -> str:
        beat, limit = culprit.beat, self._workers.stall_seconds
        who = f"rank {beat.rank} on {beat.host} ({beat.device})"
        where = f"in {beat.phase} at step {beat.step}"
        setting = f"({self.stall_name} is {limit:g})"
        if self._is_silent(culprit):
            return (
                f"{who} gave its last sign of life {culprit.age_seconds:.0f} s ago, then {where} {setting}: "
                f"its process {beat.pid} is stopped, or hangs in native code"
            )
        hint = ""
        if beat.phase == "all-reduce":
            hint = ": all ranks wait for each other; look at the network between their hosts"
        return f"{who} has been {where} for {culprit.stuck_seconds:.0f} s {setting}{hint}"

    def unnoticed_failure(self) -> Failure | None:
        """The failure of one rank that the others have not noticed for `FAILURE_GRACE_SECONDS`, or None.

        Only where all others are well: if one of them is silent, it is its death that the rank speaks of, and Spark
        starts the gang again.
        """
        if self._failure is None:
            return None
        if self._failure_seen_at is None:
            self._failure_seen_at = time.monotonic()
        beat = self._workers.heartbeat_seconds
        longest = max((rank.beat.next_seconds for rank in self._ranks.values()), default=0.0)
        grace_seconds = max(FAILURE_GRACE_SECONDS, FAILURE_GRACE_BEATS * beat, MISSED_INTERVALS * longest)
        if time.monotonic() - self._failure_seen_at < grace_seconds:
            return None
        failure = self._failure
        others = [rank for number, rank in self._ranks.items() if number != failure.rank]
        limit = (FAILURE_GRACE_BEATS - 1) * beat
        well = [r for r in others if r.beat.ended or r.age_seconds < max(limit, 2 * r.beat.next_seconds)]
        if len(well) < self._workers.count - 1 or all(rank.beat.ended for rank in well):
            return None
        return failure

    def _any_rank_runs(self) -> bool:
        """Whether any rank of the newest attempt is running."""
        return any(not rank.beat.ended and not self._is_silent(rank) for rank in self._ranks.values())

    def _stack(self, rank: int) -> str | None:
        """What faulthandler wrote on that worker; it may take a moment to arrive. None where another gang has begun
        meanwhile: the stall is over."""
        deadline, attempt = time.monotonic() + STACK_SECONDS, self._attempt
        while self._attempt == attempt:
            with storage.retry_for(0):
                try:
                    text = storage.read_bytes(stack_path(self.folder, rank)).decode(errors="replace")
                except OSError:
                    text = self._ranks[rank].beat.stack
            if text.strip() or time.monotonic() > deadline:
                return _main_thread_first(text.strip()) or "(no stack arrived from that worker)"
            time.sleep(0.2)
            with suppress(OSError, ValueError):  # that a rank hangs is the error to show
                self.read_heartbeats(now=True)
        return None


def _main_thread_first(text: str) -> str:
    """faulthandler lists the main thread last."""
    heading, *threads = text.split("\n\n")
    title, _, first = heading.partition("\n")
    return "\n\n".join([title, *reversed([first, *threads])]) if title.startswith("Timeout") else text
