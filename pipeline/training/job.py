"""What a training is asked to do, what it has reached, and what two of them must share to be the same."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from typing import Any

from pipeline import storage
from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import CheckpointSettings, ModelSettings, TrainSettings
from pipeline.data import load_manifest
from pipeline.training.result import EvaluationPoint

TOKEN = "launch-token"


@dataclass(frozen=True)
class Job:
    """What to train. ``folder`` gets the checkpoints and events; a job that finds its checkpoints there goes on.

    Its global batch, once known, stays what it is when the number of workers changes on the way.
    """

    dataset: str
    folder: str
    model: ModelSettings
    train: TrainSettings
    reader: ReaderSettings = field(default_factory=ReaderSettings)
    version: int | None = None  # of the dataset; None is the newest
    token: str = ""  # what the driver wrote into the file `TOKEN` of the folder, to see that every rank sees it
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings)

    def __post_init__(self) -> None:
        if self.train.batch_size is not None:
            object.__setattr__(self, "train", self.train.model_copy(update={"rank_batch_size": None}))


@dataclass
class Progress:
    """What a run has reached; part of every checkpoint.

    curve : one entry for each evaluation
    train_loss : mean loss of the steps since the evaluation before, one entry for each evaluation
    train_seconds : seconds of all optimizer steps so far, one entry for each evaluation
    loss_sum, loss_steps : of the steps since the last evaluation
    timed_* : of steps in a steady state, over all attempts
    """

    step: int = 0
    curve: list[EvaluationPoint] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    timed_images: int = 0
    timed_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    diverged: bool = False

    def state(self) -> dict[str, Any]:
        """The fields as plain values, for a checkpoint."""
        return {**vars(self), "curve": [point.model_dump() for point in self.curve]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Progress:
        return cls(**{**state, "curve": [EvaluationPoint(**point) for point in state["curve"]]})


def identity(job: Job) -> dict[str, Any]:
    """What two runs must share for one to go on from the other's checkpoint: all that changes a result but the number
    of workers, which may change on the way."""
    return {
        "model": job.model.model_dump(mode="json"),
        "train": job.train.model_dump(mode="json", exclude={"on_divergence", "diagnostics", "log_every_steps"}),
        "reader": job.reader.kind,
        "dataset": load_manifest(job.dataset, job.version).digest,
    }


def facts(job: Job) -> dict[str, Any]:
    """What every rank must see alike before step one; a launcher compares them over the ranks.

    Raises
    ------
    OSError
        The job's folder cannot be written here.
    ValueError
        It is not the one that the driver sees, a file in it cannot be replaced, or its disk is full.
    """
    if job.token:
        storage.check_seen(storage.join(job.folder, TOKEN), job.token, writer="the driver")
        own = storage.join(job.folder, f"launch-{socket.gethostname()}-{os.getpid()}")
        try:
            storage.check_replaces(own, job.token)
        finally:
            storage.remove(own)
        free = storage.free_bytes(job.folder)
        if free is not None and free < storage.LEAST_FREE_BYTES:
            raise ValueError(
                f"{job.folder} has {free >> 20} MiB left, and checkpoints may not fit: make room, or set `output` to "
                "another place"
            )
    return identity(job)
