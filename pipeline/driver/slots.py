"""Trials side by side: as many train at once as the cluster's slots hold, and the first error stops them all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any, TypeVar

from pipeline.cluster import resources
from pipeline.cluster.barrier import StoppedError
from pipeline.config.cluster import WorkerSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_LOOK_SECONDS = 0.5

Result = TypeVar("Result")


class Place:
    """The right to train. Entering it waits until fewer than ``at_once`` others have one.

    stop : set when all trials shall end; one that trains is ended, one that waits does not begin

    Raises
    ------
    StoppedError
        It shall end, and has not begun.
    """

    def __init__(self, places: threading.Semaphore, stop: threading.Event):
        self._places, self.stop = places, stop

    def __enter__(self) -> Place:
        while not self.stop.is_set():
            if self._places.acquire(timeout=_LOOK_SECONDS):
                return self
        raise StoppedError("another trial failed")

    def __exit__(self, *_: object) -> None:
        self._places.release()


def free_place() -> Place:
    """Where nothing else trains."""
    return Place(threading.Semaphore(1), threading.Event())


def places(spark: SparkSession, workers: Sequence[WorkerSettings], wanted: int | None) -> int:
    """How many trials may train at once, each with some of these workers.

    ``wanted`` (null: as many as fit) is a bound; over Spark Connect, where nobody can ask for slots, it is believed.
    """
    slots = [(resources.slots(spark, each), each.count) for each in workers]
    if any(number is None for number, _ in slots):
        return wanted or 1
    fit = max(1, min(number // count for number, count in slots if number is not None))
    return min(wanted or fit, fit)


def run_all(spark: SparkSession, trials: Sequence[Callable[[Place], Result]], at_once: int) -> list[Result]:
    """The results of all trials, in their order.

    A trial leaves its place when its training ends, so that the next one trains while it logs what it made.

    Raises
    ------
    Exception
        What the first trial that failed raised, once the others have stopped.
    """
    if at_once == 1:  # nothing beside a training whose speed is measured
        return [trial(free_place()) for trial in trials]
    from pyspark import inheritable_thread_target

    semaphore, stop = threading.Semaphore(at_once), threading.Event()
    session: Any = spark
    with ThreadPoolExecutor(2 * at_once, thread_name_prefix="sparknorm-trial") as pool:
        # Each with a copy of its own of Spark's thread-local properties (job group, scheduler pool).
        futures = [pool.submit(inheritable_thread_target(session)(trial), Place(semaphore, stop)) for trial in trials]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:  # also Ctrl-C
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
