"""The driver's watch over a gang: whether it runs, whether every rank makes progress, and if not, which one and where.

It reads the heartbeats that ranks publish (`heartbeat.py`) and never compares clocks of two machines: a rank says how
long it has been in its phase, and how old a heartbeat is counts from when this process saw it change.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import dataclass

from pipeline import storage
from pipeline.cluster.failures import Failure, failure_path
from pipeline.config.cluster import WorkerSettings
from pipeline.telemetry import heartbeat

# A rank whose heartbeat is this many beats old is taken for gone or frozen.
MISSED_BEATS = 5
# How long the other ranks may need to notice that one has failed. They need not: a rank on a GPU waits in a kernel of
# NCCL, and one in native code looks at no connection.
FAILURE_GRACE_SECONDS, FAILURE_GRACE_BEATS = 5.0, 4
# How long a stack dump may need to arrive.
STACK_SECONDS = 5.0


@dataclass
class _RankView:
    """The newest heartbeat of one rank, and when this process saw it first (time.monotonic)."""

    beat: heartbeat.Beat
    seen_at: float

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
    """

    def __init__(self, folder: str, workers: WorkerSettings):
        self._folder, self._workers = folder, workers
        self._earlier_attempt = heartbeat.read_attempt(folder)  # of an earlier launch: not ours
        self._attempt = ""
        self._ranks: dict[int, _RankView] = {}
        self._failure_seen_at: float | None = None
        self._life_seen_at = time.monotonic()

    def read_heartbeats(self) -> None:
        """Read what is new. Storage errors are raised at once; the caller may ignore them, and call again."""
        with storage.retry_for(0):
            self._read_heartbeats()

    def _read_heartbeats(self) -> None:
        attempt = heartbeat.read_attempt(self._folder)
        if attempt is None or (self._earlier_attempt is not None and attempt.id == self._earlier_attempt.id):
            return
        if attempt.id != self._attempt:
            self._attempt, self._failure_seen_at = attempt.id, None
            self._ranks.clear()
        for rank in range(self._workers.count):
            try:
                beat = heartbeat.read_beat(self._folder, rank)
            except FileNotFoundError:
                continue
            known = self._ranks.get(rank)
            if beat.attempt == self._attempt and (known is None or known.beat.time != beat.time):
                self._ranks[rank] = _RankView(beat, time.monotonic())
        if self._any_rank_runs():
            self._life_seen_at = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """Seconds since any rank of the newest attempt gave a sign of life: the stage waits, restarts, or ends."""
        return time.monotonic() - self._life_seen_at

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
        return f"{self._describe(culprit)}\n{self._stack(culprit.beat.rank)}"

    def _describe(self, culprit: _RankView) -> str:
        beat, limit = culprit.beat, self._workers.stall_seconds
        who = f"rank {beat.rank} on {beat.host} ({beat.device})"
        where = f"in {beat.phase} at step {beat.step}"
        setting = f"(workers.stall_seconds is {limit:g})"
        if culprit.age_seconds > MISSED_BEATS * self._workers.heartbeat_seconds:
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
        with storage.retry_for(0):
            text = self._failure_text()
        if text is None:
            return None
        if self._failure_seen_at is None:
            self._failure_seen_at = time.monotonic()
        beat = self._workers.heartbeat_seconds
        if time.monotonic() - self._failure_seen_at < max(FAILURE_GRACE_SECONDS, FAILURE_GRACE_BEATS * beat):
            return None
        failure = Failure(**json.loads(text))
        others = [rank for number, rank in self._ranks.items() if number != failure.rank]
        well = [rank for rank in others if rank.beat.ended or rank.age_seconds < (FAILURE_GRACE_BEATS - 1) * beat]
        if len(well) < self._workers.count - 1 or all(rank.beat.ended for rank in well):
            return None
        return failure

    def _failure_text(self) -> bytes | None:
        """What the rank that failed first has published, if one has."""
        try:
            return storage.read_bytes(failure_path(self._folder, self._attempt)) if self._attempt else None
        except FileNotFoundError:
            return None

    def _any_rank_runs(self) -> bool:
        """Whether any rank of the newest attempt is running."""
        limit = MISSED_BEATS * self._workers.heartbeat_seconds
        return any(not rank.beat.ended and rank.age_seconds < limit for rank in self._ranks.values())

    def _stack(self, rank: int) -> str:
        """What faulthandler wrote on that worker; it may take a moment to arrive."""
        deadline = time.monotonic() + STACK_SECONDS
        while True:
            with storage.retry_for(0):
                try:
                    text = storage.read_bytes(heartbeat.stack_path(self._folder, rank)).decode(errors="replace")
                except OSError:
                    text = self._ranks[rank].beat.stack
            if text.strip() or time.monotonic() > deadline:
                return _main_thread_first(text.strip()) or "(no stack arrived from that worker)"
            time.sleep(0.2)
            with suppress(OSError, ValueError):  # that a rank hangs is the error to show
                self.read_heartbeats()


def _main_thread_first(text: str) -> str:
    """faulthandler lists the main thread last."""
    heading, *threads = text.split("\n\n")
    title, _, first = heading.partition("\n")
    return "\n\n".join([title, *reversed([first, *threads])]) if title.startswith("Timeout") else text
