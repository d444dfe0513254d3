"""What a person sees while a command runs: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

from pipeline.cluster.session import is_connect
from pipeline.console import console
from pipeline.telemetry.events import Event

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

# Without a terminal (CI, a job's log) one line after this many seconds instead of a bar.
LINE_SECONDS = 15.0


@contextmanager
def spark_tasks(spark: SparkSession, title: str) -> Iterator[None]:
    """Show how many tasks of the running stages are done until the block ends."""
    started = time.monotonic()
    follow = _follow_server if is_connect(spark) else _follow_context
    with _bar() as bar:
        task = bar.add_task(title, total=None, detail="")
        with follow(spark, lambda done, total: bar.update(task, completed=done, total=total or None)):
            yield
    console.print(f"{title}: done in {time.monotonic() - started:.1f} s")


@contextmanager
def _follow_context(spark: SparkSession, show: Callable[[int, int], None]) -> Iterator[None]:
    tracker = spark.sparkContext.statusTracker()
    stop = threading.Event()

    def poll() -> None:
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


def _bar() -> Any:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[detail]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class _Board:
    """The one display of all training bars: a terminal takes one at a time, and trials run side by side."""

    def __init__(self) -> None:
        self.bar = _bar()
        self._users, self._lock = 0, threading.Lock()

    def begin(self) -> None:
        with self._lock:
            self._users += 1
            if self._users == 1:
                self.bar.start()

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self.bar.stop()


_board = _Board()


class TrainingBar:
    """Follows the events of one training: epoch, step, loss, images/s, time left; warnings, each text once."""

    def __init__(self, title: str, batch_size: int):
        self._title, self._batch_size = title, batch_size
        self._bar = _board.bar
        self._task = self._bar.add_task(title, total=None, detail="starting", visible=False)
        self._total = self._epochs = 0
        self._line_at = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._accuracy = ""
        self._warned: set[str] = set()

    def __enter__(self) -> TrainingBar:
        self._bar.update(self._task, visible=True)
        _board.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.remove_task(self._task)
        _board.end()

    def show(self, events: list[Event]) -> None:
        for event in events:
            if event["kind"] == "start":
                self._total, self._epochs, self._first = event["total_steps"], event["epochs"], None
            elif event["kind"] == "evaluation":
                self._accuracy = f", {event['split']} accuracy {event['accuracy']:.2%}"
            elif event["kind"] == "step":
                self._first = self._first or (event["time"], event["step"])
            elif event["kind"] == "warning" and (text := str(event.get("text"))) not in self._warned:
                self._warned.add(text)
                log.warning("%s: %s", self._title, text)
        starts = [event for event in events if event["kind"] == "start"]
        if starts:
            self._begin(starts[-1])
        steps = [event for event in events if event["kind"] == "step"]
        if steps:
            self._update(steps[-1])

    def _begin(self, event: Event) -> None:
        """Say it when a training does not begin with its first step: after a restart, or from a checkpoint."""
        attempt, step = event.get("attempt") or 1, event.get("restored_from") or 0
        if attempt > 1 or step > 0:
            detail = f"attempt {attempt}, from step {step}"
            self._bar.update(self._task, completed=step, total=self._total, detail=detail)
            console.print(f"{self._title}: {detail}", highlight=False, markup=False, soft_wrap=True)

    def _update(self, event: Event) -> None:
        first_time, first_step = self._first or (event["time"], event["step"])
        seconds, steps = event["time"] - first_time, event["step"] - first_step
        speed = f", {steps * self._batch_size / seconds:,.0f} images/s" if steps and seconds > 0 else ""
        epoch = min(self._epochs, (event["step"] - 1) * self._epochs // max(1, self._total) + 1)
        detail = f"epoch {epoch}/{self._epochs}, loss {event['loss']:.3f}{speed}{self._accuracy}"
        self._bar.update(self._task, completed=event["step"], total=self._total, detail=detail)
        if not console.is_terminal and time.monotonic() - self._line_at > LINE_SECONDS:
            self._line_at = time.monotonic()
            left = seconds / steps * (self._total - event["step"]) if steps else 0
            console.print(
                f"{self._title}: step {event['step']}/{self._total}, {detail}, {left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )
