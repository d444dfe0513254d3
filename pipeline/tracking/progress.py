"""What a person sees while a network is trained: a bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import logging
import threading
import time

from pipeline.console import console, progress_bar
from pipeline.telemetry.events import Event

log = logging.getLogger(__name__)

# Without a terminal (CI, a job's log) one line after this many seconds instead of a bar.
LINE_SECONDS = 15.0


class _Display:
    """The one display of all training bars: a terminal takes one at a time, and trials run side by side."""

    def __init__(self) -> None:
        self.bar = progress_bar()
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


_display = _Display()


class TrainingBar:
    """Shows the events of one training: epoch, step, loss, images/s, time left; warnings, each text once.

    Parameters
    ----------
    title : str
        What is trained.
    batch_size : int
        Images of one step over all workers.
    """

    def __init__(self, title: str, batch_size: int):
        self._title, self._batch_size = title, batch_size
        self._bar = _display.bar
        self._task = self._bar.add_task(title, total=None, detail="starting", visible=False)
        self._total = self._epochs = 0
        self._line_at = time.monotonic()
        self._first: tuple[float, int] | None = None
        self._accuracy = ""
        self._warned: set[str] = set()

    def __enter__(self) -> TrainingBar:
        self._bar.update(self._task, visible=True)
        _display.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.remove_task(self._task)
        _display.end()

    def show(self, events: list[Event]) -> None:
        """Bring the bar up to date with events that came since the last call, in the order written."""
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
            launch = f" (launch {attempt})" if attempt > 1 else ""
            detail = f"goes on from step {step}{launch}" if step else f"begins again{launch}"
            self._bar.update(self._task, completed=step, total=self._total, detail=detail)
            console.print(f"{self._title}: {detail}", soft_wrap=True)

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
                soft_wrap=True,
            )
