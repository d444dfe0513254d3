"""Checkpoints written beside the training: a copy in memory, and a thread that publishes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from pipeline.training import checkpoint
from pipeline.training.checkpoint import State
from pipeline.training.hooks import CallHook
from pipeline.training.job import Identity

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Publishes states in the background, one after the other.

    A write that fails is an event, and the training goes on. While one is written the next may wait: a save at an
    epoch's end does not wait for one that began shortly before.

    Parameters
    ----------
    emit : called from the thread with the kind and the fields of an event: "checkpoint" or "warning"
    flush : called from the thread to have all events stored when it returns; it raises OSError where they cannot be
    hook : called at ``before_write`` and ``after_write``
    """

    def __init__(
        self,
        folder: str,
        identity: Identity,
        *,
        keep: int,
        emit: Callable[..., None],
        flush: Callable[[], None],
        hook: CallHook = None,
    ):
        self._folder, self._identity, self._keep, self._hook = folder, identity, keep, hook
        self._emit, self._flush = emit, flush
        self._changed = threading.Condition()
        self._next: tuple[State, int] | None = None  # what is written after the one that is being written
        self._writing = False
        self._error: Exception | None = None
        self._warned = False
        self.path = ""  # of the newest that is published

    @property
    def busy(self) -> bool:
        return self._writing

    def begin(self, state: State, step: int) -> None:
        """Copy the state and write it in the background. Only where one waits already it waits until that one's turn:
        memory is bounded, and storage that hangs is noticed."""
        with self._changed:  # the driver's watch bounds it: this rank is in phase "checkpoint"
            self._changed.wait_for(lambda: self._next is None)
        copy = on_cpu(state)
        with self._changed:
            self._next = (copy, step)
            if not self._writing:
                self._writing = True
                threading.Thread(target=self._write_all, name="sparknorm-checkpoint", daemon=True).start()

    def wait(self) -> None:
        """Return when nothing is being written; whether that worked, `finish` says."""
        with self._changed:  # bounded as in `begin`
            self._changed.wait_for(lambda: not self._writing)

    def finish(self) -> None:
        """Return when all is written.

        Raises
        ------
        OSError
            The last state could not be written; the folder is named.
        """
        self.wait()
        if self._error is not None:
            reason = f"{type(self._error).__name__}: {self._error}"
            raise OSError(f"the last checkpoint could not be written to {self._folder}: {reason}") from self._error

    def _write_all(self) -> None:
        """The thread: it ends when nothing is left to write."""
        while True:
            with self._changed:
                if self._next is None:
                    self._writing = False
                    self._changed.notify_all()
                    return
                (state, step), self._next = self._next, None
                self._changed.notify_all()
            try:
                self._write(state, step)
            except BaseException:  # none is expected, and nobody must wait for a thread that has ended
                with self._changed:
                    self._writing, self._next = False, None
                    self._changed.notify_all()
                raise
            del state  # not kept beside the next one

    def _write(self, state: State, step: int) -> None:
        started = time.perf_counter()
        try:
            # A training that goes on from this state does not do its steps again: their events must outlive us.
            self._flush()
            path, size = self._save(state, step)
        except Exception as error:  # noqa: BLE001 - an event, and raised by `finish` if it was the last
            self._error = error
            if not self._warned:
                self._emit("warning", text=f"the checkpoint at step {step} could not be written to {self._folder}: "
                                           f"{type(error).__name__}: {error}; training goes on")  # fmt: skip
            self._warned = True
        else:
            self._error, self._warned, self.path = None, False, path
            self._emit("checkpoint", step=step, seconds=time.perf_counter() - started, bytes=size)

    def _save(self, state: State, step: int) -> tuple[str, int]:
        if self._hook is None:
            return checkpoint.save(self._folder, state, step=step, identity=self._identity, keep=self._keep)
        try:
            self._hook("before_write", step=step)
            return checkpoint.save(self._folder, state, step=step, identity=self._identity, keep=self._keep)
        finally:
            self._hook("after_write", step=step)


def on_cpu(value: Any) -> Any:
    """A copy of nested dicts and lists with their tensors on the CPU, which later steps do not change."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [on_cpu(item) for item in value]
    return value
