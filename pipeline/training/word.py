"""What rank 0 says to all ranks with the loss of each step: to go on, to save, or to end with it.

The driver ends a launch before its training's end by writing down its token. A rank that ends by itself leaves its
process ready for the next training; Spark looks every 2 s only whether a task was cancelled, and its worker trains on
in the slot until then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from enum import IntEnum

from pipeline import storage
from pipeline.distributed.worker import Worker
from pipeline.training.job import Job

_ENDED = "ended-launch"
# Between two looks for it: a look at a mounted path is one small read.
_LOOK_SECONDS = 0.1


class Word(IntEnum):
    """What all ranks do after a step."""

    GO_ON = 0
    SAVE = 1
    END = 2


class EndedError(RuntimeError):
    """The driver has ended this launch, and waits for no result of it."""

    final = True


def looks_for_end(job: Job) -> bool:
    """Whether the ranks of a job see that its launch was ended: on remote storage each look would be a request."""
    return job.live and bool(job.token) and storage.is_local(job.folder)


def end_launch(job: Job) -> None:
    """Have all ranks of this launch of a job end after the step that they are at. Another launch, also of a driver that
    has taken the job over, has another token and is not meant."""
    storage.publish(storage.join(job.folder, _ENDED), job.token.encode(), durable=False)


class FirstRank:
    """Decides on rank 0 what all ranks do after a step; the other ranks have no say.

    save_is_due : says whether to save after so many steps
    """

    def __init__(self, worker: Worker, job: Job, save_is_due: Callable[[int], bool]):
        self._decides, self._token, self._save_is_due = worker.rank == 0, job.token, save_is_due
        self._looks = self._decides and looks_for_end(job)
        self._path, self._look_at = storage.join(job.folder, _ENDED), 0.0

    def word_after(self, step: int) -> Word:
        """What is to be done once ``step`` steps are taken; on other ranks than 0 nothing."""
        if not self._decides:
            return Word.GO_ON
        if self._looks and self._is_ended():
            return Word.END
        return Word.SAVE if self._save_is_due(step) else Word.GO_ON

    def _is_ended(self) -> bool:
        if time.monotonic() < self._look_at:
            return False
        self._look_at = time.monotonic() + _LOOK_SECONDS
        with suppress(OSError), storage.retry_for(0):  # not there, or read at the next look
            return storage.read_bytes(self._path) == self._token.encode()
        return False
