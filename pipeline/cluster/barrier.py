"""Run ``fn(worker, *args)`` on N barrier tasks and return the results: launch, watch, errors. The driver's half.

A worker *process* that dies takes the stage down and Spark restarts the whole gang by itself (up to four times in a
row), because ``repartition(1)`` before ``collect()`` makes the barrier stage a shuffle-map stage; a result stage would
be given up. An *exception* in ``fn`` is not Spark's to retry: it travels to the driver as a result, with its rank, host
and traceback, and is raised there as `WorkerError` (`elastic` tries again where that may help). A rank that does not
get on, and a stage that does not start, are ended by the driver.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.cluster import resources
from pipeline.cluster.session import is_connect, spark_reason
from pipeline.cluster.task import SCHEMA, Facts, Task, describe, first_of, run_task
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

LOOK_SECONDS = 0.5
# How long Spark may take to end a stage that was cancelled.
CANCEL_SECONDS = 30.0
TOO_FEW_SLOTS = "SPARK-24819"  # in Spark's own error about it


class LaunchError(RuntimeError):
    """The barrier stage could not be started."""


class ShortageError(LaunchError):
    """There are fewer slots than workers."""

    def __init__(self, text: str, slots: int):
        super().__init__(text)
        self.slots = slots


class StoppedError(LaunchError):
    """The caller asked for the end."""


class GangLostError(LaunchError):
    """The gang ran and its workers were lost; another launch may go on from a checkpoint.

    waited : there are too few slots, and ``workers.slots_wait_seconds`` have gone by since then
    """

    def __init__(self, text: str, *, waited: bool = False):
        super().__init__(text)
        self.waited = waited


class WorkerError(RuntimeError):
    """``fn`` raised on a worker. The message names rank, host and phase and carries the worker's own traceback.

    final : it would be raised again
    """

    def __init__(self, text: str, *, final: bool = False):
        super().__init__(text)
        self.final = final


class StallError(WorkerError):
    """A rank did not get on. The message names it, says where it is, and carries its stack."""

    def __init__(self, text: str):
        super().__init__(text, final=True)


def run(
    spark: SparkSession,
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    workers: WorkerSettings,
    facts: Facts | None = None,
    folder: str | None = None,
    limit_seconds: float | None = None,
    stop: threading.Event | None = None,
) -> list[Any]:
    """Run ``fn(worker, *args)`` on ``workers.count`` barrier tasks and return their results in rank order.

    Parameters
    ----------
    fn : a module-level function; executors import its module
    facts : ``facts(*args)`` runs on every rank before the process group is joined; ranks that disagree are an error
    folder : of the job, which the driver and all executors see: with it, ranks publish heartbeats and a rank that does
        not get on is found
    limit_seconds : bound on the whole, for functions that take a known time
    stop : ends the stage when it is set

    Raises
    ------
    ValueError
        No executor of this cluster can have what ``workers.task_cpus`` and ``workers.task_gpus`` ask for.
    LaunchError
        Too few slots, or the stage did not start.
    GangLostError
        Spark gave the stage up, or executors are gone for good (the cause is attached).
    StoppedError
        ``stop`` was set.
    WorkerError
        ``fn`` or ``facts`` raised, the ranks disagree, or (`StallError`) one of them does not get on.
    """
    wait_for_slots(spark, workers)
    if advice := resources.idle_gpus(spark, workers):
        log.warning(advice)
    task = Task(fn, tuple(args), workers, facts, folder)

    def body(batches: Iterator[Any]) -> Iterator[Any]:
        # Only plain values are captured: neither the session nor anything that holds it.
        yield from run_task(task, batches)

    def stage() -> Any:
        tasks = spark.range(0, workers.count, 1, workers.count)
        profile = resources.training_profile(workers)
        return tasks.mapInArrow(body, SCHEMA, barrier=True, profile=profile).repartition(1)

    watch = Watch(folder, workers) if folder is not None else None
    limits = _Limits(limit_seconds, stop)
    rows = _collect_patiently(spark, stage, workers, watch, limits)
    failures = [pickle.loads(row.payload) for row in rows if row.failed]
    if failures:
        raise WorkerError(describe(failures), final=first_of(failures).final)
    return [pickle.loads(row.payload) for row in sorted(rows, key=lambda row: row.rank)]


@dataclass(frozen=True)
class _Limits:
    """When a stage is ended from outside; None: never."""

    seconds: float | None
    stop: threading.Event | None

    def check(self, workers: WorkerSettings, passed: float) -> None:
        if self.seconds is not None and passed > self.seconds:
            raise LaunchError(f"the barrier stage of {workers.count} workers did not end within {self.seconds} s")
        if self.stop is not None and self.stop.is_set():
            raise StoppedError("the training was stopped, since another one failed")


def wait_for_slots(spark: SparkSession, workers: WorkerSettings) -> None:
    """Return once the cluster can run all tasks at once. Spark itself would wait ten minutes in silence.

    Raises
    ------
    ShortageError
        It cannot, ``workers.slots_wait_seconds`` after the first look (at once in local mode, where slots are fixed).
    """
    if spark.conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise LaunchError("barrier stages need fixed executors: set spark.dynamicAllocation.enabled=false")
    deadline = time.monotonic() + (0 if _is_local(spark) else workers.slots_wait_seconds)
    while (slots := resources.slots(spark, workers)) is not None and slots < workers.count:
        if time.monotonic() >= deadline:
            raise ShortageError(_shortage(spark, workers, slots), slots)
        time.sleep(0.5)


def _is_local(spark: SparkSession) -> bool:
    """Whether slots cannot change: executors and driver are one process."""
    if is_connect(spark):
        return False
    master = str(spark.sparkContext.master)
    return master.startswith("local") and not master.startswith("local-cluster")


def _shortage(spark: SparkSession, workers: WorkerSettings, slots: int) -> str:
    master = str(spark.sparkContext.master)
    asked = [f"{value} {what}" for value, what in ((workers.task_cpus, "cores"), (workers.task_gpus, "GPUs")) if value]
    each = f" of {' and '.join(asked)}" if asked else ""
    more = f"cores (master local[{workers.count}])" if _is_local(spark) else "cores, GPUs or executors"
    fewer = f"set workers.count to at most {slots}, or " if slots else ""
    return (
        f"workers.count is {workers.count}, but {master} has {slots} slots{each}: {fewer}give the cluster more {more}"
    )


def _collect_patiently(
    spark: SparkSession,
    stage: Callable[[], Any],
    workers: WorkerSettings,
    watch: Watch | None,
    limits: _Limits,
) -> list[Any]:
    """`_collect`, tried again while Spark itself finds too few slots: over Spark Connect nobody could ask before, and
    an executor may go in between. Each try is of a new DataFrame: an adaptive plan that has failed only repeats its
    failure.
    """
    deadline = time.monotonic() + workers.slots_wait_seconds
    while True:
        try:
            return _collect(spark, stage(), workers, watch, limits)
        except GangLostError as error:
            if TOO_FEW_SLOTS not in str(error.__cause__):
                raise
            if time.monotonic() >= deadline:
                raise ShortageError(
                    f"workers.count is {workers.count}, and the cluster has fewer slots "
                    f"(waited workers.slots_wait_seconds = {workers.slots_wait_seconds:g}): {error}",
                    workers.count - 1,
                ) from error
        time.sleep(1)


def _collect(
    spark: SparkSession, stage: Any, workers: WorkerSettings, watch: Watch | None, limits: _Limits
) -> list[Any]:
    """The rows of the stage, from a thread of its own, so that this one can watch it and end it."""
    tag = f"sparknorm-{uuid.uuid4().hex}"
    outcome: dict[str, Any] = {}

    def collect() -> None:
        # The thread ends with the stage, and its tag with it.
        if is_connect(spark):
            spark.addTag(tag)
        else:
            spark.sparkContext.addJobTag(tag)
        try:
            outcome["rows"] = stage.collect()
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            outcome["error"] = error

    thread = _thread(spark, collect)
    thread.start()
    started = time.monotonic()
    try:
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            limits.check(workers, time.monotonic() - started)
            if watch is not None and thread.is_alive():
                _judge(spark, workers, watch)
    except BaseException:  # also Ctrl-C: nothing goes on training behind the user's back
        _cancel(spark, tag, thread)
        raise
    if "error" not in outcome:
        return outcome["rows"]
    where = f" (last seen: {watch.positions()})" if watch is not None and watch.positions() else ""
    raise GangLostError(
        f"Spark gave up the barrier stage of {workers.count} workers: {spark_reason(outcome['error'])}{where}"
    ) from outcome["error"]


def _judge(spark: SparkSession, workers: WorkerSettings, watch: Watch) -> None:
    """Raise if the stage will not end by itself."""
    try:
        watch.look()
        failure = watch.failure()
    except (OSError, ValueError) as error:  # seen again at the next look
        log.debug("heartbeats could not be read: %s", error)
        return
    if failure is not None:
        raise WorkerError(describe([failure]), final=failure.final)
    stall = watch.stalled()
    if stall is not None:
        raise StallError(stall)
    quiet = watch.quiet_seconds
    if quiet > workers.slots_wait_seconds:
        slots = resources.slots(spark, workers)
        if slots is not None and slots < workers.count:
            raise GangLostError(_shortage(spark, workers, slots), waited=True)
    if quiet > max(workers.stall_seconds, workers.slots_wait_seconds):
        where = f"; last seen: {watch.positions()}" if watch.positions() else ""
        raise GangLostError(
            f"no worker of the barrier stage has given a sign of life for {quiet:.0f} s (workers.stall_seconds): "
            f"the cluster may have fewer than {workers.count} free slots, or executors cannot be reached{where}"
        )


def _thread(spark: SparkSession, target: Callable[[], None]) -> threading.Thread:
    """A thread that keeps the caller's Spark properties (scheduler pool, job group)."""
    if is_connect(spark):
        return threading.Thread(target=target, name="sparknorm-stage", daemon=True)
    from pyspark import InheritableThread

    thread = InheritableThread(target=target, name="sparknorm-stage")
    thread.daemon = True
    return thread


def _cancel(spark: SparkSession, tag: str, thread: threading.Thread) -> None:
    with suppress(Exception):  # the reason for cancelling is the error to show
        if is_connect(spark):
            spark.interruptTag(tag)
        else:  # Spark 4.3's own interruptTag finds no job of a classic session whose plan is adaptive
            spark.sparkContext.cancelJobsWithTag(tag)
        thread.join(CANCEL_SECONDS)
