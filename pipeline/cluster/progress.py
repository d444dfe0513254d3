"""What a person sees while Spark works: how many tasks are done."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pipeline.cluster.connect import is_connect
from pipeline.cluster.errors import spark_failures
from pipeline.console import console, progress_bar

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@contextmanager
def spark_tasks(spark: SparkSession, title: str) -> Iterator[None]:
    """Show how many tasks of the running stages are done until the block ends."""
    started = time.monotonic()
    follow = _follow_server if is_connect(spark) else _follow_context
    with progress_bar() as bar:
        task = bar.add_task(title, total=None, detail="")
        with follow(spark, lambda done, total: bar.update(task, completed=done, total=total or None)):
            yield
    console.print(f"{title}: done in {time.monotonic() - started:.1f} s")


@contextmanager
def _follow_context(spark: SparkSession, show: Callable[[int, int], None]) -> Iterator[None]:
    tracker = spark.sparkContext.statusTracker()
    stop = threading.Event()

    def poll() -> None:
        with suppress(OSError, *spark_failures()):  # whoever waits for the tasks gets the error too
            follow()

    def follow() -> None:
        while not stop.wait(0.3):
            stages = [tracker.getStageInfo(stage) for stage in tracker.getActiveStageIds()]
            done = sum(stage.numCompletedTasks for stage in stages if stage)
            show(done, sum(stage.numTasks for stage in stages if stage))

    thread = threading.Thread(target=poll, name="sparknorm-progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=5)


@contextmanager
def _follow_server(spark: SparkSession, show: Callable[[int, int], None]) -> Iterator[None]:
    """Over Spark Connect the server reports, every two seconds, all stages of a query. Those of which no task is done
    may be ones that it skips."""

    def report(*, stages: Iterable[Any] | None, inflight_tasks: int, **_: Any) -> None:
        begun = [stage for stage in stages or () if stage.num_completed_tasks]
        done = sum(stage.num_completed_tasks for stage in begun)
        show(done, max(done + inflight_tasks, sum(stage.num_tasks for stage in begun)))

    handler: Any = report  # pyspark's type is a class, but it only calls it
    spark.registerProgressHandler(handler)
    try:
        yield
    finally:
        spark.removeProgressHandler(handler)
