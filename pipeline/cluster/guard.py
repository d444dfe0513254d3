"""When a barrier stage that runs is ended from outside: asked to, too late, or since its ranks will not end it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.cluster import resources
from pipeline.cluster.errors import GangLostError, LaunchError, ShortageError, StallError, WorkerError
from pipeline.cluster.failures import describe, headline, read_join_failure
from pipeline.cluster.stop import Stop
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

# With less free disk than this no sign of life can be written.
NO_ROOM_BYTES = 64 << 10


@dataclass(frozen=True)
class Guard:
    """Decides when a running stage is ended from outside.

    Parameters
    ----------
    watch
        Reads the ranks' heartbeats; None where they publish none.
    limit_seconds, stop, ask_to_end
        As in `barrier.run`.
    launch
        Id of the launch.
    """

    workers: WorkerSettings
    watch: Watch | None = None
    limit_seconds: float | None = None
    stop: Stop | None = None
    launch: str = ""
    ask_to_end: Callable[[], None] | None = None

    def check_limits(self, passed_seconds: float) -> None:
        """Raise if the caller asked for the end, or the time is over."""
        if self.limit_seconds is not None and passed_seconds > self.limit_seconds:
            raise LaunchError(
                f"the barrier stage of {self.workers.count} workers did not end within {self.limit_seconds:g} s"
                f"{self._why_not_joined()}{self.last_positions(' (last seen: {})')}"
            )
        self.check_stop()

    def check_stop(self) -> None:
        """Raise if the caller asked for the end."""
        if self.stop is not None and self.stop.is_set():
            raise self.stop.as_error("the training was stopped, since another one failed")

    def check_ranks(self, spark: SparkSession) -> None:
        """Raise if the ranks' heartbeats say that the stage will not end by itself."""
        if self.watch is None:
            return
        try:
            self.watch.read_heartbeats()
        except (OSError, ValueError) as error:  # read again next time, but not for ever
            log.debug("heartbeats could not be read: %s", error)
            self._check_sight(self.watch, error)
            return
        failure = self.watch.unnoticed_failure()
        if failure is not None:
            raise WorkerError(describe([failure]), final=failure.final)
        stall = self.watch.stall()
        if stall is not None:
            raise StallError(stall)
        if self.limit_seconds is None:  # which bounds the silence too
            self._check_signs_of_life(spark, self.watch.silent_seconds)

    def _check_sight(self, watch: Watch, error: Exception) -> None:
        """Raise where this process could not read the folder of its ranks for longer than storage may be away."""
        blind_seconds = watch.blind_seconds
        if blind_seconds > max(self._lost_seconds, storage.RETRY_SECONDS):
            raise LaunchError(
                f"the driver could not read for {blind_seconds:.0f} s how the workers are "
                f"(workers.stall_seconds): {error}{self.last_positions('; last seen: {}')}; when that can be read, "
                "give the same command again"
            )

    @property
    def _lost_seconds(self) -> float:
        """How long nothing may be known of any rank."""
        return max(self.workers.stall_seconds, self.workers.slots_wait_seconds)

    def _check_signs_of_life(self, spark: SparkSession, silent_seconds: float) -> None:
        workers, lost_seconds = self.workers, self._lost_seconds
        if silent_seconds > lost_seconds:
            self._check_room()
        if silent_seconds > workers.slots_wait_seconds:
            try:
                resources.check_slots(spark, workers)
            except ShortageError as error:
                raise GangLostError(str(error), waited=True) from None
        if silent_seconds > lost_seconds:
            raise GangLostError(
                f"no worker of the barrier stage has given a sign of life for {silent_seconds:.0f} s "
                f"(workers.stall_seconds): the cluster may have fewer than {workers.count} free slots, or executors "
                f"cannot be reached{self.last_positions('; last seen: {}')}"
            )

    def _check_room(self) -> None:
        """Raise where it is the disk that is full, and not the workers that are gone."""
        assert self.watch is not None, "it is asked where ranks publish heartbeats"
        folder = self.watch.folder
        free = storage.free_bytes(folder)
        if free is not None and free < NO_ROOM_BYTES:
            raise LaunchError(
                f"{folder} has no room left, where workers say how they are and what they have done: make room there "
                "or set `output` to another disk, and give the same command again"
            )

    def _why_not_joined(self) -> str:
        failure = read_join_failure(self.watch.folder, self.launch) if self.watch is not None else None
        return f": {headline(failure)}" if failure is not None else ""

    def last_positions(self, form: str) -> str:
        """Where each rank was last seen, put into a text; empty where nobody saw one."""
        positions = self.watch.positions() if self.watch is not None else ""
        return form.format(positions) if positions else ""
