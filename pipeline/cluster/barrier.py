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
from pipeline.cluster.errors import (
    GangLostError,
    LaunchError,
    ShortageError,
    StallError,
    WorkerError,
    spark_reason,
)
from pipeline.cluster.failures import describe, first_of, headline, read_join_failure
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

# Between two looks at a stage that runs.
LOOK_SECONDS = 0.5
# How long Spark may take to end a stage that was cancelled.
CANCEL_SECONDS = 30.0
# With less free disk than this no sign of life can be written.
NO_ROOM_BYTES = 64 << 10
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
    limit_seconds, stop
        A bound on the whole stage, for functions that take a known time; an event that ends it when it is set.
    stall_name
        What messages call ``workers.stall_seconds``, where that is not what the user has set.

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
    guard = Guard(workers, watch, limit_seconds, stop, task.launch)
    with _listening(spark, watch) as driver:
        rows = collect_when_slots_allow(spark, lambda: _stage(spark, replace(task, driver=driver)), guard)
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


@dataclass(frozen=True)
class Guard:
    """Decides when a running stage is ended from outside.

    Parameters
    ----------
    watch
        Reads the ranks' heartbeats; None where they publish none.
    limit_seconds, stop
        As in `run`.
    launch
        Id of the launch.
    """

    workers: WorkerSettings
    watch: Watch | None = None
    limit_seconds: float | None = None
    stop: Stop | None = None
    launch: str = ""

    def check_limits(self, passed_seconds: float) -> None:
        """Raise if the caller asked for the end, or the time is over."""
        if self.limit_seconds is not None and passed_seconds > self.limit_seconds:
            raise LaunchError(
                f"the barrier stage of {self.workers.count} workers did not end within {self.limit_seconds:g} s"
                f"{self._why_not_joined()}{self.last_positions(' (last seen: {})')}"
            )
        if self.stop is not None and self.stop.is_set():
            raise self.stop.as_error("the training was stopped, since another one failed")

    def check_ranks(self, spark: SparkSession) -> None:
        """Raise if the ranks' heartbeats say that the stage will not end by itself."""
        if self.watch is None:
            return
        try:
            self.watch.read_heartbeats()
            failure = self.watch.unnoticed_failure()
        except (OSError, ValueError) as error:  # read again next time
            log.debug("heartbeats could not be read: %s", error)
            return
        if failure is not None:
            raise WorkerError(describe([failure]), final=failure.final)
        stall = self.watch.stall()
        if stall is not None:
            raise StallError(stall)
        if self.limit_seconds is None:  # which bounds the silence too
            self._check_signs_of_life(spark, self.watch.silent_seconds)

    def _check_signs_of_life(self, spark: SparkSession, silent_seconds: float) -> None:
        workers, lost_seconds = self.workers, max(self.workers.stall_seconds, self.workers.slots_wait_seconds)
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
    started = time.monotonic()
    try:
        while thread.is_alive():
            thread.join(LOOK_SECONDS)
            guard.check_limits(time.monotonic() - started)
            if thread.is_alive():
                guard.check_ranks(spark)
    except BaseException:  # also Ctrl-C: nothing goes on training behind the user's back
        _cancel(spark, tag, thread)
        raise
    if outcome.error is None:
        return outcome.rows
    guard.check_limits(time.monotonic() - started)  # what ends this command may have ended Spark, too
    raise GangLostError(
        f"Spark gave up the barrier stage of {guard.workers.count} workers: {spark_reason(outcome.error)}"
        f"{guard.last_positions(' (last seen: {})')}"
    ) from outcome.error


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
