"""Trials side by side: as many train at once as the cluster's slots hold, and the first error stops them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster import resources
from pipeline.cluster.stop import Stop
from pipeline.config.cluster import WorkerSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_POLL_SECONDS = 0.5

Result = TypeVar("Result")


class TrainingSlot:
    """The right to train. Entering it waits until fewer than all trials that may train at once do.

    Parameters
    ----------
    free : counts the trainings that may still begin; by default nothing else trains
    stop : set when all trials must end; one that trains is ended, one that waits does not begin

    Raises
    ------
    StoppedError
        All trials must end, and this one has not begun.
    """

    def __init__(self, free: threading.Semaphore | None = None, stop: Stop | None = None):
        self._free = free or threading.Semaphore(1)
        self.stop = stop or Stop()

    def __enter__(self) -> TrainingSlot:
        while not self.stop.is_set():
            if self._free.acquire(timeout=_POLL_SECONDS):
                return self
        raise self.stop.as_error("another trial failed")

    def __exit__(self, *_: object) -> None:
        self._free.release()


def trials_at_once(spark: SparkSession, workers: Sequence[WorkerSettings], wanted: int | None) -> int:
    """The number of trials that may train at once.

    Parameters
    ----------
    workers : what the trials ask for, one entry for each kind of trial
    wanted : an upper bound, or None for as many as the cluster's slots hold; over Spark Connect, where nobody can ask
        for slots, it is believed, and None means 1
    """
    slots = [(resources.slots(spark, each), each.count) for each in workers]
    if any(number is None for number, _ in slots):
        return wanted or 1
    fitting = max(1, min(number // count for number, count in slots if number is not None))
    return min(wanted or fitting, fitting)


def run_all(
    spark: SparkSession,
    trials: Sequence[Callable[[TrainingSlot], Result]],
    at_once: int,
    stop: Stop | None = None,
) -> list[Result]:
    """Run trials, at most ``at_once`` of which train at a time, and return their results in their order.

    A trial leaves its slot when its training ends, so that the next one trains while it logs its result. All of them
    end when ``stop`` is set, by the caller or here, after an error.

    Raises
    ------
    Exception
        What the first trial that failed raised, once the others have stopped.
    """
    if at_once == 1:  # nothing beside a training whose speed is measured
        return [trial(TrainingSlot(stop=stop)) for trial in trials]
    from pyspark import inheritable_thread_target

    free, stop = threading.Semaphore(at_once), stop or Stop()
    session: Any = spark
    with ThreadPoolExecutor(2 * at_once, thread_name_prefix="sparknorm-trial") as pool:
        # Each with a copy of its own of Spark's thread-local properties (job group, scheduler pool).
        futures = [pool.submit(inheritable_thread_target(session)(trial), TrainingSlot(free, stop)) for trial in trials]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException as error:
            if isinstance(error, Exception):
                stop.set()
            else:  # Ctrl-C, or SIGTERM
                stop.kill()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
