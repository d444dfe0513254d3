"""The events of a training, which its ranks write into storage and the driver reads: executors need no credentials.

A writer publishes small whole files of JSON lines; a reader returns each line once, in the order written. Files of
a restarted attempt sort after those of the one before.

The first steps of a training are seen at once; then its files become fewer, since each is a request to storage, and an
object in it. An attempt writes at most a file every 20 s (10 s on a mounted path), one more for each checkpoint and,
over an hour, for 60 evaluations.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

from pipeline import storage
from pipeline.config.secrets import masked

log = logging.getLogger(__name__)

# Between two files of a writer: so many times its ``flush_seconds`` at first and at most, and so many times what was
# between the two before; on remote storage, where each is a request, and on a mounted path.
_FIRST, _LONGEST, _GROWTH = 2, 20, 2.0
_FIRST_LOCAL, _LONGEST_LOCAL, _GROWTH_LOCAL = 1, 10, 1.5
# Files that are published ahead of their time: so many at once, and then one in so many seconds.
_EARLY_FILES, _EARLY_SECONDS = 5, 60.0
# Between two tries to write to storage that cannot be reached: each may take as long as its driver has patience.
_LONGEST_PAUSE_SECONDS = 30.0

# What an evaluation counts beside accuracy and loss; versions before 0.7.0 did not.
_SCORES = ("balanced_accuracy", "macro_f1", "calibration_error")

# One JSON object: ``kind``, ``time`` (of writing, in seconds since 1970) and the fields of its kind.
Event = dict[str, Any]

# Beyond these, what should be a time or a number of steps is none, and no database takes it.
_LATEST_TIME, _MOST_STEPS = 1e11, 1 << 53


class EventWriter:
    """Writes the events of one attempt of one rank.

    Parameters
    ----------
    folder : of the events of one job
    flush_seconds : on a mounted path between the first two files, growing to 10 times that; on remote storage twice as
        long, growing to 20 times
    run : called with what `emit` and `flush_early` do to storage; a thread's, for instance, so that they wait for none
    """

    def __init__(
        self,
        folder: str,
        rank: int,
        *,
        flush_seconds: float = 1.0,
        run: Callable[[Callable[[], None]], None] = lambda task: task(),
    ):
        self._run = run
        self._prefix = f"{_newest_stamp(folder):020d}-{rank:05d}"
        self._folder = folder
        is_local = storage.is_local(folder)
        self._growth = _GROWTH_LOCAL if is_local else _GROWTH
        self._interval_seconds = flush_seconds * (_FIRST_LOCAL if is_local else _FIRST)
        self._longest_seconds = flush_seconds * (_LONGEST_LOCAL if is_local else _LONGEST)
        self._early_files, self._early_at = float(_EARLY_FILES), time.monotonic()
        self._lines: list[str] = []
        self._files = 0
        self._publishing = threading.Lock()
        self._failing = False
        self._pause_seconds = self._interval_seconds  # until the next try; it grows faster while storage fails
        self._tried_at = time.monotonic()

    def emit(self, kind: str, **fields: Any) -> None:
        """Add one event, with fields of JSON values, whose secrets are masked, from any thread.

        Storage that fails is no error here, and is not waited for: a later call tries again.
        """
        self._lines.append(json.dumps({"kind": kind, "time": time.time(), **masked(fields)}))
        if self._is_due():
            self._run(self._flush_if_due)

    def _is_due(self) -> bool:
        return time.monotonic() - self._tried_at >= self._pause_seconds

    def _flush_if_due(self) -> None:
        if self._is_due():  # no longer, where this comes after another flush
            self.try_to_flush()

    def flush_early(self) -> None:
        """`try_to_flush` before its time, unless that was called too often."""
        now = time.monotonic()
        earned = (now - self._early_at) / _EARLY_SECONDS
        self._early_files, self._early_at = min(float(_EARLY_FILES), self._early_files + earned), now
        if self._early_files >= 1:
            self._early_files -= 1
            self._run(self.try_to_flush)

    def try_to_flush(self) -> None:
        """Publish the events that are not published yet, if storage takes them now and no other thread is at it."""
        if not self._publishing.acquire(blocking=False):
            return
        try:
            with storage.retry_for(0):
                self._publish()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("events could not be written to %s and are kept: %s", self._folder, error)
            self._failing = True
            if isinstance(error, storage.UnreachableError):
                self._pause_seconds = min(max(1.0, 2 * self._pause_seconds), _LONGEST_PAUSE_SECONDS)
        finally:
            self._publishing.release()

    def flush(self) -> None:
        """Publish the events that are not published yet.

        Raises
        ------
        OSError
            The storage does not take it; nothing is lost, and a later call tries again.
        """
        with self._publishing:
            self._publish()

    def _publish(self) -> None:
        try:
            if lines := self._lines[:]:
                name = f"{self._prefix}-{self._files:06d}.jsonl"
                storage.publish(storage.join(self._folder, name), ("\n".join(lines) + "\n").encode())
                self._files += 1
                self._pause_seconds = self._interval_seconds
                self._interval_seconds = min(self._growth * self._interval_seconds, self._longest_seconds)
                del self._lines[: len(lines)]  # another thread may have added some meanwhile
        finally:
            self._tried_at = time.monotonic()


def _newest_stamp(folder: str) -> int:
    """The time in ns, or later than a file from a host whose clock is ahead, so that files sort as attempts do."""
    try:
        stamps = [name.partition("-")[0] for name in storage.names(folder) if name.endswith(".jsonl")]
    except OSError as error:
        log.warning("events of earlier attempts cannot be listed; by this host's clock these are later: %s", error)
        stamps = []
    return max([time.time_ns(), *(int(stamp) + 1 for stamp in stamps if stamp.isdecimal() and len(stamp) == 20)])


class EventReader:
    """Reads every event of a folder once, over as many calls of `new` as it takes.

    Attributes
    ----------
    complete : whether the last call read all that was there
    failure : what kept it from that; None where nothing did
    """

    def __init__(self, folder: str):
        self._folder = folder
        self._seen: set[str] = set()
        self.complete = False
        self.failure: Exception | None = None

    def new(self, max_files: int | None = None) -> list[Event]:
        """The events published since the last call, of the first ``max_files`` files.

        Storage that fails, or a file that vanishes after it was listed, ends the call early: later files wait for the
        next call, so that the order stays that of writing. A damaged file gives its whole lines up to the damage.
        """
        events: list[Event] = []
        self.complete, self.failure = False, None
        try:
            with storage.retry_for(0):
                names = [n for n in storage.names(self._folder) if n.endswith(".jsonl") and n not in self._seen]
                paths = [storage.join(self._folder, name) for name in names[:max_files]]
                for name, data in zip(names, storage.read_many(paths), strict=False):
                    if isinstance(data, Exception):
                        raise data
                    self._seen.add(name)
                    events += self._events(name, data)
            self.complete = len(names) <= (max_files or len(names))
        except Exception as error:  # noqa: BLE001 - whatever it is, a training does not end for it
            self.failure = error
        return events

    def _events(self, name: str, data: bytes) -> list[Event]:
        """The events of one file, up to the first line that is not an event."""
        *lines, rest = data.split(b"\n")
        events: list[Event] = []
        try:
            for line in lines:
                events.append(_event(line))
            if rest or not lines:
                raise ValueError("its end is missing" if rest else "it is empty")
        except (ValueError, RecursionError) as error:
            path = storage.join(self._folder, name)
            log.warning("event file %s is damaged: %d events of it are used; %s", path, len(events), error)
        return events


def _event(line: bytes) -> Event:
    """The event of one line. ValueError: it is not one."""
    event = json.loads(line.decode())
    if not (isinstance(event, dict) and isinstance(event.get("kind"), str)):
        raise ValueError("a line is not an event")
    time_written, step = event.get("time"), event.get("step", 0)
    if not (isinstance(time_written, (int, float)) and 0 <= time_written < _LATEST_TIME):  # NaN is not
        raise ValueError("an event has no time")
    if not (isinstance(step, int) and 0 <= step < _MOST_STEPS):
        raise ValueError("an event has a step that is none")
    return event


def metric_values(event: Event) -> dict[str, float | None]:
    """The values of one event that are metrics, by the metric's name; empty where its kind has none.

    Raises
    ------
    KeyError
        The event lacks a field of its kind.
    """
    if event["kind"] == "step":
        return {"train/loss": event["loss"], "train/learning_rate": event["learning_rate"]}
    if event["kind"] == "evaluation":
        return {
            f"{event['split']}/accuracy": event["accuracy"],
            f"{event['split']}/loss": event["loss"],
            **{f"{event['split']}/{score}": event.get(score) for score in _SCORES},
            **{f"{event['select_on']}/{name}": value for name, value in (event.get("selection") or {}).items()},
            "train/mean_loss": event["train_loss"],
            "train/images_per_second": event["images_per_second"],
            "epoch": event["epoch"],
            **_milliseconds_by_rank(event.get("ranks") or []),
        }
    if event["kind"] == "diagnostics":
        return {f"diagnostics/{name}": value for name, value in event["values"].items()}
    return {}


def _milliseconds_by_rank(ranks: list[Event]) -> dict[str, float | None]:
    """Where the time of each rank went since the evaluation before, in ms for each step."""
    return {
        f"rank_{rank['rank']}/{part}_ms": 1000 * seconds / rank["steps"]
        for rank in ranks
        for part in ("data_wait", "compute", "all_reduce")
        if (seconds := rank.get(f"{part}_seconds")) is not None and rank["steps"]
    }
