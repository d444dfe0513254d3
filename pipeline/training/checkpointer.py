"""When a training saves its state, what of it each rank gives, and how all ranks take it up again."""

from __future__ import annotations

import logging
import time

import torch

from models.saved_state import load_saved
from pipeline import storage
from pipeline.data import Manifest
from pipeline.distributed.worker import Worker
from pipeline.training import checkpoint, rank_state
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.event_log import EventLog
from pipeline.training.hooks import CallHook
from pipeline.training.job import Job, identity
from pipeline.training.optimizer import load_optimizer
from pipeline.training.progress import Progress, TrainingState
from pipeline.training.selection import SelectedNetwork

log = logging.getLogger(__name__)

# Where a checkpoint is loaded to. It holds what all ranks know, and a GPU has room for the network once.
_HOST = torch.device("cpu")


class Checkpointer:
    """Saves and restores the state of one training, in ``checkpoints`` below the folder of its job.

    manifest : of the job's dataset, where it is loaded already
    """

    def __init__(
        self,
        worker: Worker,
        job: Job,
        state: TrainingState,
        events: EventLog,
        hook: CallHook = None,
        manifest: Manifest | None = None,
    ):
        self._worker, self._job, self._state, self._events, self._hook = worker, job, state, events, hook
        self._folder, self._identity = storage.join(job.folder, "checkpoints"), identity(job, manifest)
        self._writer = CheckpointWriter(
            self._folder, self._identity, keep=job.checkpoint.keep, emit=events.emit, flush=events.flush, hook=hook
        )
        self._saved_at = time.monotonic()

    @property
    def path(self) -> str:
        """Path of the newest checkpoint that is written, on rank 0; empty before there is one."""
        return self._writer.path

    def is_due(self, step: int) -> bool:
        """Whether to save after this step; not before the last state is written. Rank 0's word counts."""
        when = self._job.checkpoint
        if self._writer.busy:
            return False
        if when.every_steps is not None:
            return step % when.every_steps == 0
        return time.monotonic() - self._saved_at >= when.every_seconds

    def save(self) -> None:
        """All ranks give what they alone know; rank 0 writes, while training goes on.

        ``model`` is the network that was evaluated: at the end of an epoch and of the training, with its statistics;
        at the end it may be an earlier one, which ``selected`` keeps (see `selection`).
        """
        state, progress = self._state, self._state.progress
        self._worker.status.enter("checkpoint")
        ranks = self._worker.gather(rank_state.capture(self._worker, state.model))
        if self._worker.rank == 0:
            average = state.average.state() if state.average else {}
            values = {
                "model": {**state.model.state_dict(), **average, **state.evaluated_state},
                "weights": dict(state.model.named_parameters()) if state.average else {},
                "optimizer": state.optimizer.state_dict(),
                "progress": progress.values(),
                "ranks": ranks,
            }
            if state.selected:
                values["selected"] = state.selected.values()
            self._writer.begin(values, progress.step)
        self._saved_at = time.monotonic()
        if self._hook:
            self._hook("checkpoint_begun", step=progress.step, wait_until_written=self._writer.wait)

    def restore(self) -> None:
        """Take up the newest whole checkpoint, if there is one: rank 0 finds it, the others load that very one.

        Raises
        ------
        CheckpointError
            It belongs to another run, or a rank does not find what rank 0 has read.
        VersionsError
            Other versions have made it, and ``checkpoint.other_versions`` is ``refuse``.
        UnreachableError
            Storage fails for longer than it is tried again: a training that would begin anew loses what it has done.
        """
        worker, state = self._worker, self._state
        worker.status.enter("restore")
        rank_state.seed_all(worker, self._job.train.seed)
        values = None
        if worker.rank == 0:
            values = checkpoint.load_newest(
                self._folder,
                identity=self._identity,
                device=_HOST,
                repair=True,
                other_versions=self._job.checkpoint.other_versions,
                warn=self._warn,
            )
        newest = torch.tensor(values["progress"]["step"] if values else 0, device=worker.device)
        with worker.status.waiting():
            step = int(worker.all_reduce_sum(newest))
        if step and worker.rank > 0:
            values = checkpoint.load_step(self._folder, step, identity=self._identity, device=_HOST)
        if values is not None:
            load_saved(state.model, values["model"])
            if state.average:
                state.average.load(values["model"])
                state.model.load_state_dict(values["weights"], strict=False)
            load_optimizer(state.optimizer, values["optimizer"])
            state.progress = Progress.from_values(values["progress"])
            if "selected" in values:
                state.selected = SelectedNetwork.from_values(values["selected"])
            rank_state.restore(worker, state.model, values["ranks"], seed=self._job.train.seed, step=step)
            self._writer.path = storage.join(self._folder, f"step-{step:08d}.pt")
        if self._hook:
            self._hook("restored", step=state.progress.step)

    def _warn(self, text: str) -> None:
        """Say it here and, by an event, to whoever watches the training."""
        log.warning("%s", text)
        self._events.emit("warning", text=text)

    def finish(self) -> None:
        """Return when all is written.

        Raises
        ------
        OSError
            The last state could not be written.
        """
        self._worker.status.enter("checkpoint")
        self._writer.finish()
