"""What workers tell the driver while they run, through storage: executors need no tracking credentials.

A writer publishes small whole files of JSON lines; a reader returns each line once, in the order written. Files of
a restarted attempt sort after those of the one before.
"""

from __future__ import annotations

import json
import time
from typing import Any

from pipeline import storage

Event = dict[str, Any]


class EventWriter:
    """Events of one attempt of one rank. `emit` buffers; a file is published at most once a ``flush_seconds``."""

    def __init__(self, folder: str, rank: int, *, flush_seconds: float = 1.0):
        self._prefix = f"{time.time_ns():020d}-{rank:05d}"
        self._folder = folder
        self._flush_seconds = flush_seconds
        self._lines: list[str] = []
        self._files = 0
        self._flushed_at = time.monotonic()

    def emit(self, kind: str, **fields: Any) -> None:
        self._lines.append(json.dumps({"kind": kind, "time": time.time(), **fields}))
        if time.monotonic() - self._flushed_at >= self._flush_seconds:
            self.flush()

    def flush(self) -> None:
        self._flushed_at = time.monotonic()
        if self._lines:
            name = f"{self._prefix}-{self._files:06d}.jsonl"
            storage.publish(storage.join(self._folder, name), ("\n".join(self._lines) + "\n").encode())
            self._files += 1
            self._lines.clear()


class EventReader:
    """Every event of a folder once, over as many calls of `new` as it takes."""

    def __init__(self, folder: str):
        self._folder = folder
        self._seen: set[str] = set()

    def new(self) -> list[Event]:
        """The events published since the last call."""
        events: list[Event] = []
        for name in storage.names(self._folder):
            if name.endswith(".jsonl") and name not in self._seen:
                lines = storage.read_bytes(storage.join(self._folder, name)).decode().splitlines()
                events += [json.loads(line) for line in lines]
                self._seen.add(name)
        return events
