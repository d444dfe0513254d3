"""Hand the events that workers publish to the bar and to MLflow while a training runs, and the rest when it ends.

Two threads, so that the bar never waits for MLflow: one reads and shows, the other offers what was read to MLflow,
again and again until MLflow takes it. Both are daemons, and every wait for them has a limit: a call that hangs can be
left behind, but not ended.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from pipeline import storage
from pipeline.telemetry.events import Event, EventReader
from pipeline.tracking.client import longest_call_seconds, store_name
from pipeline.tracking.outage import AGAIN_SECONDS, TrackingError, is_outage, reason
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.run import TrackedRun

log = logging.getLogger(__name__)

RELAY_SECONDS = 0.5
# On a mounted path, where somebody decides by the events.
_WATCHED_SECONDS = 0.1
# A look at a folder of many files, on remote storage, takes long: at most a fifth of the time goes into it.
_PAUSES, _LONGEST_PAUSE_SECONDS = 4, 30.0
# Each look at remote storage is a request. The pauses between them grow, before the first events come and from then on.
_GROWTH, _FIRST_PAUSE_SECONDS, _LAUNCH_PAUSE_SECONDS, _REMOTE_PAUSE_SECONDS = 1.5, 1.0, 2.0, 20.0
# A long list is read and passed on a part at a time, so that it is seen to move on.
_FILES_AT_ONCE, _EVENTS_AT_ONCE = 200, 500


class _Pauses:
    """The pauses between looks for new events.

    is_local : whether the events lie on a mounted path, where a look costs next to nothing
    is_watched : whether somebody decides by them, so that pauses stay short
    """

    def __init__(self, *, is_local: bool, is_watched: bool = False):
        self._is_local, self._found, self._seconds = is_local, False, _FIRST_PAUSE_SECONDS
        self._local_seconds = _WATCHED_SECONDS if is_watched else RELAY_SECONDS
        self._longest_seconds = _LAUNCH_PAUSE_SECONDS if is_watched else _REMOTE_PAUSE_SECONDS

    def next(self, look_seconds: float, *, found: bool) -> float:
        """Seconds to wait after a look that took so long, and has found events or none."""
        if found and not self._found:
            self._found, self._seconds = True, _FIRST_PAUSE_SECONDS
        seconds = self._local_seconds if self._is_local else self._seconds
        longest = self._longest_seconds if self._found else _LAUNCH_PAUSE_SECONDS
        self._seconds = min(_GROWTH * self._seconds, longest)
        return min(max(seconds, _PAUSES * look_seconds), _LONGEST_PAUSE_SECONDS)


class Relay:
    """Passes on the events of ``folder`` while the block runs; at its end, what is left.

    watch : called with the events as they are read, from the thread that shows them; it raises nothing. None where
        nobody watches

    If MLflow is down then, it is waited for up to ``run.outage_seconds``. If the block fails, its error is the one to
    show, and what is left is offered once.

    Raises
    ------
    TrackingError
        MLflow did not take all events, or the storage did not give them, within that time.
    """

    def __init__(
        self, folder: str, run: TrackedRun, bar: TrainingBar, watch: Callable[[Sequence[Event]], None] | None = None
    ):
        self._folder, self._run, self._bar, self._watch = folder, run, bar, watch
        self._reader = EventReader(folder)
        self._waiting: list[Event] = []  # read, and not yet taken by MLflow
        self._lock = threading.Lock()
        self._ending, self._all_read, self._all_taken = threading.Event(), threading.Event(), threading.Event()
        self._left = threading.Event()  # nobody waits for the threads any more
        self._storage_error: Exception | None = None  # of the last look
        self._server_error: Exception | None = None  # of the last offer
        self._moved_at = time.monotonic()
        self._threads = [
            threading.Thread(target=self._read, name="sparknorm-event-reader", daemon=True),
            threading.Thread(target=self._pass_on, name="sparknorm-relay", daemon=True),
        ]

    def __enter__(self) -> Relay:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        try:
            complete = self._finish(0.0 if kind else self._run.outage_seconds)
        finally:
            self._left.set()
            for thread in self._threads:
                thread.join(timeout=AGAIN_SECONDS)
        if not complete:
            error = self._storage_error or self._server_error
            text = (
                f"{len(self._waiting) or 'some'} events did not reach MLflow at {store_name()}: "
                f"{reason(error) if error else 'no answer'}. Nothing is lost: they are in "
                f"{self._folder}, and running the same command again passes them on"
            )
            if kind is None:
                refused = error is not None and error is self._server_error and not is_outage(error)
                waited = "" if refused else f" (waited tracking.outage_seconds = {self._run.outage_seconds:g})"
                raise TrackingError(text + waited) from error
            log.warning("%s", text)

    def _finish(self, patience_seconds: float) -> bool:
        """Wait until all is passed on. False if nothing moves for too long, or if MLflow refuses."""
        self._storage_error = self._server_error = None
        self._moved_at = time.monotonic()
        self._ending.set()
        told = False
        while not self._all_taken.wait(0.05):
            error = self._storage_error or self._server_error
            if self._server_error and not is_outage(self._server_error):
                return False
            quiet_seconds = time.monotonic() - self._moved_at
            if quiet_seconds >= patience_seconds + (0.0 if error else longest_call_seconds()):
                return False
            if error and not told:
                told = True
                log.warning("the last events wait up to %g s for MLflow: %s", patience_seconds, reason(error))
        return True

    def _read(self) -> None:
        """Read and show until the training has ended and all is read."""
        pauses = _Pauses(is_local=storage.is_local(self._folder), is_watched=self._watch is not None)
        while not self._left.is_set():
            ending = self._ending.is_set()  # taken before the look: what it does not find now never comes
            started = time.monotonic()
            events = self._reader.new(_FILES_AT_ONCE)
            with self._lock:
                self._waiting += events
            if self._watch is not None:
                self._watch(events)
            self._show(events)
            self._storage_error = self._complain("events cannot be read", self._storage_error, self._reader.failure)
            if events:
                self._moved_at = time.monotonic()
            if self._reader.failure or self._reader.complete:
                if ending and self._reader.complete:
                    self._all_read.set()
                    return
                pause_seconds = pauses.next(time.monotonic() - started, found=bool(events))
                (self._left if ending else self._ending).wait(RELAY_SECONDS if ending else pause_seconds)

    def _show(self, events: list[Event]) -> None:
        try:
            self._bar.show(events)
        except Exception:  # a bar is not worth a training
            log.warning("the bar cannot show an event", exc_info=log.isEnabledFor(logging.DEBUG))

    def _pass_on(self) -> None:
        """Offer to MLflow what is read until it has all of it."""
        while not self._left.is_set():
            last = self._all_read.is_set()  # taken before the list: nothing is added to it afterwards
            with self._lock:
                events = self._waiting[:_EVENTS_AT_ONCE]
            try:
                if events:
                    self._run.log_events(events)
            except Exception as error:  # noqa: BLE001 - offered again, and raised at the end
                self._server_error = self._complain(
                    "MLflow does not take metrics; they are kept", self._server_error, error
                )
                self._left.wait(AGAIN_SECONDS)
                continue
            self._server_error = None
            if events:
                with self._lock:
                    del self._waiting[: len(events)]
                self._moved_at = time.monotonic()
            elif last:
                self._all_taken.set()
                return
            else:
                self._all_read.wait(RELAY_SECONDS)

    def _complain(self, what: str, before: Exception | None, error: Exception | None) -> Exception | None:
        """Say what is wrong when it begins, not at every try; at the end `_finish` says it. Returns ``error``."""
        if error and not before and not self._ending.is_set():
            log.warning("%s and will be tried again: %s", what, reason(error))
        return error
