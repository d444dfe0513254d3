"""How trainings that run are asked to end, and what they end with then."""

from __future__ import annotations

import threading

from pipeline.cluster.errors import KilledError, StoppedError


class Stop(threading.Event):
    """Is set when trainings must end: since another one failed, or since the whole command is ended from outside."""

    def __init__(self) -> None:
        super().__init__()
        self._killed = False

    def kill(self) -> None:
        """Set it since the command is ended: the trainings have not failed, and the same command goes on with them."""
        self._killed = True
        self.set()

    def was_killed(self) -> bool:
        return self._killed

    def as_error(self, otherwise: str) -> StoppedError:
        """What a training ends with that was asked to; ``otherwise`` is the text where the command goes on."""
        if self.was_killed():
            return KilledError("the command was ended, and this training with it")
        return StoppedError(otherwise)
