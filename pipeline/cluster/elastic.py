"""Launch a training, and launch it again from its newest checkpoint, with fewer workers where executors are gone.

Spark itself restarts a gang a few times (`barrier.py`). This is for what it gives up: more deaths than it allows one
stage, executors that do not come back, and exceptions, of which some pass (storage or network for a moment) and others
come again; a training that has saved nothing new since it was launched is not launched again.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

from pipeline.cluster import barrier, resources
from pipeline.config.cluster import WorkerSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.training.job import Job
    from pipeline.training.result import TrainResult

log = logging.getLogger(__name__)


def train(
    spark: SparkSession, job: Job, workers: WorkerSettings, *, stop: threading.Event | None = None
) -> TrainResult:
    """`train.fit` on as many workers as there are, at most ``workers.count``; its result. ``stop`` ends it when set.

    Raises
    ------
    LaunchError
        There are fewer slots than ``workers.min_count`` (``workers.count`` where it is null), or the gang was lost
        again without one new checkpoint.
    StoppedError
        ``stop`` was set.
    WorkerError
        The training failed, and launched again without one new checkpoint; or it did in a way that does not pass.
    """
    from pipeline import storage
    from pipeline.training import checkpoint
    from pipeline.training.job import facts
    from pipeline.training.loop import fit

    checkpoints = storage.join(job.folder, "checkpoints")
    size = world_size(spark, workers, job.train.lanes)
    lost: RuntimeError
    while True:
        reached = checkpoint.newest_step(checkpoints)
        gang = workers.model_copy(update={"count": size})
        try:
            return barrier.run(spark, fit, (job,), workers=gang, facts=facts, folder=job.folder, stop=stop)[0]
        except (barrier.GangLostError, barrier.ShortageError) as error:
            if "UNAVAILABLE" in str(error.__cause__):  # the Spark Connect server is gone, and each call waits for it
                raise
            lost, waited = error, isinstance(error, barrier.ShortageError) or error.waited
            next_size = _after_loss(spark, workers, job.train.lanes, size, waited)
        except barrier.WorkerError as error:
            if error.final:
                raise
            lost, next_size = error, size
        step = checkpoint.newest_step(checkpoints)
        if next_size == size and step == reached:  # it is less where the newest one was damaged
            raise lost
        log.warning("%s; going on from step %d with %d workers", str(lost).partition("\n")[0], step, next_size)
        size = next_size


def world_size(spark: SparkSession, workers: WorkerSettings, lanes: int) -> int:
    """The largest number of workers that fits, at most ``workers.count``; waits for that many first.

    Raises
    ------
    LaunchError
        Not even ``workers.min_count`` fit after ``workers.slots_wait_seconds``.
    """
    try:
        barrier.wait_for_slots(spark, workers)
    except barrier.ShortageError as error:
        fitting = [size for size in _sizes(workers, lanes) if size <= error.slots]
        if not fitting:
            raise
        log.warning("%s; going on with %d, since workers.min_count is %s", error, fitting[0], workers.min_count)
        return fitting[0]
    return workers.count


def _sizes(workers: WorkerSettings, lanes: int) -> list[int]:
    """Numbers of workers that may train, the largest first."""
    least = workers.min_count or workers.count
    return [size for size in range(workers.count, least - 1, -1) if lanes % size == 0]


def _after_loss(spark: SparkSession, workers: WorkerSettings, lanes: int, size: int, waited: bool) -> int:
    """The number to go on with after a gang of ``size`` was lost; ``waited``: slots were waited for already."""
    if resources.slots(spark, workers) is not None:
        return world_size(spark, workers.model_copy(update={"slots_wait_seconds": 0}) if waited else workers, lanes)
    # Over Spark Connect nobody says how many slots there are: one size less.
    time.sleep(1)
    return next((smaller for smaller in _sizes(workers, lanes) if smaller < size), size)
