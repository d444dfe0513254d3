"""Run ``fn(worker, *args)`` on N barrier tasks and return the results: launch, watch, errors. The driver's half.

A worker *process* that dies takes the stage down and Spark restarts the whole gang by itself (up to four times in a
row), because ``repartition(1)`` before ``collect()`` makes the barrier stage a shuffle-map stage; a result stage would
be given up. An *exception* in ``fn`` is not Spark's to retry: it travels to the driver as a result, with its rank, host
and traceback, and is raised there as `WorkerError` (`elastic` tries again where that may help). A rank that makes no
progress, and a stage that does not start, are ended by the driver.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tenacity import Retrying, retry_if_exception, stop_after_delay, wait_fixed

from pipeline import storage
from pipeline.cluster import resources
from pipeline.cluster.connect import is_connect
from pipeline.cluster.errors import GangLostError, ShortageError, StoppedError, WorkerError, spark_reason
from pipeline.cluster.failures import describe, first_of
from pipeline.cluster.guard import Guard
from pipeline.cluster.introduction import Facts
from pipeline.cluster.rendezvous_address import announce_launch
from pipeline.cluster.stop import Stop
from pipeline.cluster.task import SCHEMA, Task, run_task
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings
from pipeline.telemetry.driver_link import DriverAddress, listening

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

log = logging.getLogger(__name__)

# Between two looks at a stage that runs, and between two whether it is to be stopped, which ask nobody.
LOOK_SECONDS, STOP_LOOK_SECONDS = 0.5, 0.1
# How long a function that was asked to end may take before its stage is cancelled.
END_SECONDS = 2.0
# How long Spark may take to end a stage that was cancelled.
CANCEL_SECONDS = 30.0
TOO_FEW_SLOTS = "SPARK-24819"  # in Spark's own error about it


def run(
    spark: SparkSession,
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    *,
    workers: WorkerSettings,
    facts: Callable[..., Facts] | None = None,
    check: Callable[..., None] | None = None,
    folder: str | None = None,
    is_shared: bool = True,
    limit_seconds: float | None = None,
    stop: Stop | None = None,
    ask_to_end: Callable[[], None] | None = None,
    stall_name: str = "workers.stall_seconds",
) -> list[Any]:
    """Run ``fn(worker, *args)`` on ``workers.count`` barrier tasks and return their results in rank order.

    Parameters
    ----------
    fn
        A module-level function; executors import its module.
    facts, check
        ``facts(*args)`` runs on every rank before the process group is joined; ranks that disagree are an error. Then
        ``check(*args)`` runs on the first rank of each host, for what it raises.
    folder
        The folder of the job, which the driver and all executors see: with it, ranks find each other without Spark's
        `allGather` (`rendezvous_address`) and publish heartbeats, and one that makes no progress is noticed.
    is_shared
        Whether all executors are known to see the folder. Where not, ranks find each other by Spark's `allGather`, and
        a rank that does not see it leaves nothing there.
    limit_seconds, stall_name
        A bound on the whole stage, for functions that take a known time; what messages call ``workers.stall_seconds``.
    stop, ask_to_end
        The stage is ended when ``stop`` is set. ``ask_to_end()`` is called then: the function ends by itself, and its
        processes are kept. Where that takes longer than `END_SECONDS`, or nobody can ask, the stage is cancelled.

    Raises
    ------
    ValueError
        No executor of this cluster can have what ``workers.task_cpus`` and ``workers.task_gpus`` ask for.
    LaunchError
        There are too few slots, or the stage did not start.
    GangLostError
        Spark gave the stage up, or executors are gone for good (the cause is attached).
    StoppedError
        ``stop`` was set.
    WorkerError
        ``fn`` or ``facts`` raised, the ranks disagree, or (`StallError`) one of them makes no progress.
    """
    resources.wait_for_slots(spark, workers)
    if advice := resources.idle_gpus(spark, workers):
        log.warning(advice)
    task = Task(fn, tuple(args), workers, facts, folder, launch=uuid.uuid4().hex, is_shared=is_shared, check=check)
    if folder is not None:
        announce_launch(folder, task.launch)
    watch = Watch(folder, workers, stall_name) if folder is not None else None
    guard = Guard(workers, watch, limit_seconds, stop, task.launch, ask_to_end)
    with _listening(spark, watch) as driver:
        rows = collect_when_slots_allow(spark, lambda: _stage(spark, replace(task, driver=driver)), guard)
    return _results(rows)


def _results(rows: Sequence[Row]) -> list[Any]:
    """What the ranks returned, in their order; raises what the first of them that failed did."""
    if failures := [pickle.loads(row.payload) for row in rows if row.failed]:
        raise WorkerError(describe(failures), final=first_of(failures).final)
    return [pickle.loads(row.payload) for row in sorted(rows, key=lambda row: row.rank)]


@contextmanager
def _listening(spark: SparkSession, watch: Watch | None) -> Iterator[DriverAddress | None]:
    """Let ranks tell the watch how they are, where each beat would be a request to remote storage otherwise."""
    if watch is None or storage.is_local(watch.folder) or is_connect(spark):
        yield None
        return
    conf = spark.sparkContext.getConf()
    host = conf.get("spark.driver.host", "")
    with listening(host, conf.get("spark.driver.bindAddress", host), watch.hear) as driver:
        yield driver


def _stage(spark: SparkSession, task: Task) -> DataFrame:
    """The rows of all ranks, once it is collected."""

    def body(batches: Iterator[Any]) -> Iterator[Any]:
        # Only plain values are captured: neither the session nor anything that holds it.
        yield from run_task(task, batches)

    tasks = spark.range(0, task.workers.count, 1, task.workers.count)
    profile = resources.training_profile(task.workers)
    options = {} if profile is None else {"profile": profile}  # which Spark before 4.0 does not know
    return tasks.mapInArrow(body, SCHEMA, barrier=True, **options).repartition(1)


def collect_when_slots_allow(spark: SparkSession, stage: Callable[[], DataFrame], guard: Guard) -> list[Row]:
    """The rows of a stage, collected again while Spark itself says that there are too few slots.

    Over Spark Connect nobody could ask before, and an executor may go in between. Each try is of a new DataFrame: an
    adaptive plan that has failed only repeats its failure.
    """
    workers = guard.workers
    again = Retrying(
        retry=retry_if_exception(_has_too_few_slots),
        stop=stop_after_delay(workers.slots_wait_seconds),
        wait=wait_fixed(1),
        reraise=True,
    )
    try:
        return again(lambda: _collect(spark, stage(), guard))
    except GangLostError as error:
        if not _has_too_few_slots(error):
            raise
        raise ShortageError(
            f"workers.count is {workers.count}, and the cluster has fewer slots "
            f"(waited workers.slots_wait_seconds = {workers.slots_wait_seconds:g}): {error}",
            workers.count - 1,
        ) from error


def _has_too_few_slots(error: BaseException) -> bool:
    return isinstance(error, GangLostError) and TOO_FEW_SLOTS in str(error.__cause__)


@dataclass
class _Outcome:
    """What a stage ended with: its rows, or what Spark raised."""

    rows: list[Row] = field(default_factory=list)
    error: BaseException | None = None


def _collect(spark: SparkSession, stage: DataFrame, guard: Guard) -> list[Row]:
    """Collect the rows of the stage in a thread of its own, so that this one can watch the stage and end it."""
    tag = f"sparknorm-{uuid.uuid4().hex}"
    outcome = _Outcome()

    def collect() -> None:
        # The thread ends with the stage, and its tag with it.
        if is_connect(spark):
            spark.addTag(tag)
        else:
            spark.sparkContext.addJobTag(tag)
        try:
            outcome.rows = stage.collect()
        except BaseException as error:  # noqa: BLE001 - raised in the calling thread
            outcome.error = error

    thread = _thread(spark, collect)
    thread.start()
    try:
        _watch_until_end(spark, thread, guard)
    finally:  # also Ctrl-C: nothing goes on training behind the user's back
        if thread.is_alive():
            _cancel(spark, tag, thread)
    if outcome.error is None:
        return outcome.rows
    guard.check_stop()  # what ends this command may have ended Spark, too
    raise GangLostError(
        f"Spark gave up the barrier stage of {guard.workers.count} workers: {spark_reason(outcome.error)}"
        f"{guard.last_positions(' (last seen: {})')}"
    ) from outcome.error


def _watch_until_end(spark: SparkSession, thread: threading.Thread, guard: Guard) -> None:
    """Return when the stage has ended; raise what ends it from outside, once it was given its chance to end itself."""
    started = time.monotonic()
    look_at = started + LOOK_SECONDS
    try:
        while thread.is_alive():
            thread.join(STOP_LOOK_SECONDS)
            guard.check_limits(time.monotonic() - started)
            if thread.is_alive() and time.monotonic() >= look_at:
                look_at = time.monotonic() + LOOK_SECONDS
                guard.check_ranks(spark)
    except StoppedError:
        if guard.ask_to_end is not None and thread.is_alive():
            with suppress(Exception):  # storage that fails: it is cancelled then
                guard.ask_to_end()
                thread.join(END_SECONDS)
        raise


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
