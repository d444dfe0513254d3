"""The events of one training, which rank 0 writes for all ranks."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from pipeline import storage
from pipeline.distributed.worker import Worker
from pipeline.telemetry.events import EventWriter

log = logging.getLogger(__name__)


class EventLog:
    """Every part of a training may emit events, from any thread; on ranks other than 0 that does nothing.

    A thread stores them: no step waits for storage, which may take minutes to say that it cannot be reached.

    Parameters
    ----------
    folder : of the job; the events are in ``events`` below it
    live : whether what is emitted with ``force`` is stored at once, however often that is asked
    """

    def __init__(self, worker: Worker, folder: str, *, live: bool = False):
        self._live, self._writer = live, None
        if worker.rank == 0:
            self._background = _Background("sparknorm-events")
            self._writer = EventWriter(storage.join(folder, "events"), worker.rank, run=self._background.run)

    def emit(self, kind: str, *, force: bool = False, **fields: Any) -> None:
        """Emit one event with fields of JSON values.

        With ``force`` it, and all before it, is stored at once if the storage takes it now and that was not asked too
        often (see `EventWriter.flush_early`); else it is kept, and is stored later.
        """
        if self._writer:
            self._writer.emit(kind, **fields)
            if force and self._live:
                self._background.run(self._writer.try_to_flush)
            elif force:
                self._writer.flush_early()

    def flush(self) -> None:
        """Return when what was emitted is stored.

        Raises
        ------
        OSError
            The storage does not take it.
        """
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Store what was emitted, if the storage takes it: the error that ends a training is the one to show."""
        if self._writer:
            self._background.end()
            try:
                with storage.retry_for(0):
                    self._writer.flush()
            except OSError as error:
                log.warning("the last events could not be written: %s", error)


class _Background:
    """A thread that runs one task after the other. What waits already is not added again."""

    def __init__(self, name: str):
        self._name, self._changed, self._tasks = name, threading.Condition(), dict[Callable[[], None], None]()
        self._thread: threading.Thread | None = None
        self._ended = False

    def run(self, task: Callable[[], None]) -> None:
        with self._changed:
            self._tasks[task] = None
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run_all, name=self._name, daemon=True)
                self._thread.start()

    def end(self) -> None:
        """Drop what was not begun, and have the thread end after what it is at."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _run_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._tasks or self._ended)
                if self._ended:
                    return
                task = next(iter(self._tasks))
                del self._tasks[task]
            try:
                task()
            except Exception:
                log.exception("events could not be stored, and are kept")
