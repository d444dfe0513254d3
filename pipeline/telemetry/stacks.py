"""The stacks of all threads of a rank that hangs.

faulthandler writes them from a thread of its own in C, so that also a rank that hangs in native code and holds the
interpreter lock tells where.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline import storage

log = logging.getLogger(__name__)

RANKS = "ranks"  # folder of what ranks say of themselves, below that of their job


def stack_path(folder: str, rank: int) -> str:
    """Where a rank of the job with this folder leaves its stacks, if the folder is a mounted path."""
    return storage.join(folder, RANKS, f"rank-{rank:05d}.stack")


class Stacks:
    """Has the stacks of one rank dumped where it does not get on, while the block of `watching` runs.

    Parameters
    ----------
    folder : of the job
    stall_seconds : in one position, after which they are dumped
    """

    def __init__(self, folder: str, rank: int, stall_seconds: float):
        self._folder, self._rank, self._stall_seconds = folder, rank, stall_seconds
        self._are_seen = storage.is_local(folder)  # by the driver, also where no Python code can run any more
        self._armed_at = self._told_at = -1.0  # the positions for which they are to be dumped, and were told
        self._file: Any = None
        self._failed = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        with _stack_file(self._folder, self._rank) as self._file:
            try:
                yield
            finally:
                faulthandler.cancel_dump_traceback_later()

    def watch(self, since: float) -> None:
        """Have the stacks dumped where the rank does not leave the position that it is in since then.

        Where that cannot be done the rank lives without: it is better than to be taken for dead.
        """
        if since == self._armed_at:
            return
        try:
            self._file.seek(0)
            self._file.truncate()  # of an earlier stall, which is over
            faulthandler.dump_traceback_later(self._stall_seconds, file=self._file)
            self._armed_at = since
        except Exception as error:  # noqa: BLE001 - of the file, or of faulthandler
            if not self._failed:
                log.warning("should this worker hang, its stack will not be known: %s: %s", type(error).__name__, error)
            self._failed = True

    def to_tell(self, since: float) -> str:
        """What the driver is to be told of the position that the rank is in since then; empty where it can read the
        file itself, where the rank does not hang, or where nothing was dumped."""
        if self._are_seen or time.monotonic() - since <= self._stall_seconds:
            return ""
        return Path(self._file.name).read_text(errors="replace")

    def is_new(self, since: float) -> bool:
        """Whether there is something to tell that was not told."""
        return since != self._told_at and bool(self.to_tell(since))

    def told(self, since: float) -> None:
        self._told_at = since


@contextlib.contextmanager
def _stack_file(folder: str, rank: int) -> Iterator[Any]:
    """Open a file for faulthandler: in the job's folder where that is a mounted path, else on the local disk."""
    if storage.is_local(folder):
        path = Path(storage.absolute(stack_path(folder, rank)))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+") as file:
            yield file
    else:
        with tempfile.NamedTemporaryFile("w+", suffix=".stack") as file:
            yield file
