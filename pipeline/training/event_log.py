"""The events of one training, which rank 0 writes for all ranks."""

from __future__ import annotations

from typing import Any

from pipeline import storage
from pipeline.distributed.worker import Worker
from pipeline.telemetry.events import EventWriter


class EventLog:
    """Every part of a training may emit events, from any thread; on ranks other than 0 that does nothing.

    Parameters
    ----------
    folder : of the job; the events are in ``events`` below it
    live : whether what is emitted with ``force`` is stored at once, however often that is asked
    """

    def __init__(self, worker: Worker, folder: str, *, live: bool = False):
        self._live = live
        self._writer = EventWriter(storage.join(folder, "events"), worker.rank) if worker.rank == 0 else None

    def emit(self, kind: str, *, force: bool = False, **fields: Any) -> None:
        """Emit one event with fields of JSON values.

        With ``force`` it, and all before it, is stored at once if the storage takes it now and that was not asked too
        often (see `EventWriter.flush_early`); else it is kept, and is stored later.
        """
        if self._writer:
            self._writer.emit(kind, **fields)
            if force and self._live:
                self._writer.try_to_flush()
            elif force:
                self._writer.flush_early()

    def flush(self) -> None:
        """Store what was emitted.

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
            self._writer.try_to_flush()
