"""What `train` has left: the newest network of these settings, and images of the split that it was evaluated on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import nn

from models.saved_state import load_saved
from pipeline import storage
from pipeline.cluster.connect import import_from
from pipeline.config.settings import Settings
from pipeline.data import Manifest, reader
from pipeline.data.shards import SplitFiles
from pipeline.driver import checks
from pipeline.driver.train import training_name
from pipeline.driver.trial import BegunTrial, newest_finished, trials_folder
from pipeline.report.comparison import TrialResult
from pipeline.serving.result import ExportError
from pipeline.training import checkpoint
from pipeline.training.job import Job
from pipeline.training.network import network_for


@dataclass(frozen=True)
class Trained:
    """A network whose training has ended.

    name : of the training
    network : in evaluation mode, on the CPU; takes uint8 images (N, C, H, W), gives float32 logits (N, classes)
    job : what it was trained by
    manifest : of the dataset that it was trained on
    checkpoint : path of the file that it was loaded from
    result : of the training
    """

    name: str
    network: nn.Module
    job: Job
    manifest: Manifest
    checkpoint: str
    result: TrialResult


def find_trained(settings: Settings, *, remedy: str = "run `sparknorm train`") -> Trained:
    """The newest finished training of these settings, as `train` leaves it in the output folder.

    Parameters
    ----------
    remedy : the commands that an error names where there is none

    Raises
    ------
    NetworkError
        The network is one's own, and cannot be imported here.
    ExportError
        There is none, it diverged, or its last checkpoint is gone.
    VersionsError
        Other versions have trained it, and ``checkpoint.other_versions`` is ``refuse``.
    """
    import_from(settings.spark)  # there is no session that would do it
    settings, manifest = checks.open_dataset(settings)
    name = training_name(settings)
    trial = newest_finished(settings, manifest, name)
    result = trial and trial.record.content.result
    if trial is None or not isinstance(result, TrialResult):
        raise ExportError(
            f"{trials_folder(settings)} has no finished training {name!r} with these settings and this dataset: "
            f"{remedy} with the same settings first"
        )
    return load_trained(settings, manifest, trial, name, result)


def load_trained(settings: Settings, manifest: Manifest, trial: BegunTrial, name: str, result: TrialResult) -> Trained:
    """The network that a finished training has left in its last checkpoint.

    Parameters
    ----------
    settings : of the training
    name : of the training
    result : of the training

    Raises
    ------
    CheckpointError
        The checkpoint is of other settings.
    ExportError, VersionsError
        See `find_trained`.
    """
    if result.diverged:
        raise ExportError(f"the newest training in {trial.job.folder} diverged: train with other settings first")
    checkpoints = storage.join(trial.job.folder, "checkpoints")
    state = checkpoint.load_newest(
        checkpoints,
        identity=trial.identity,
        device=torch.device("cpu"),
        other_versions=settings.checkpoint.other_versions,
    )
    if state is None or state["progress"]["step"] != result.steps:
        raise ExportError(f"{checkpoints} has no whole checkpoint of the last step, {result.steps}: train again")
    network = network_for(trial.job.model, manifest)
    load_saved(network, state["model"])
    path = storage.join(checkpoints, f"step-{result.steps:08d}.pt")
    return Trained(name, network.eval().requires_grad_(False), trial.job, manifest, path, result)


def first_images(trained: Trained, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of the split that the training was evaluated on: uint8 (N, C, H, W), int64 (N,), N <= most."""
    blocks = list(blocks_of(trained, trained.job.train.evaluate_on, most, rows=most))
    return torch.cat([images for images, _ in blocks]), torch.cat([labels for _, labels in blocks])


def blocks_of(
    trained: Trained, split: str, most: int, *, rows: int = 256
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The first images of a split, a block of at most ``rows`` after the other: uint8 (N, C, H, W) and int64 (N,)."""
    job, left = trained.job, most
    with closing(SplitFiles(job.dataset, trained.manifest, split, job.reader)) as files:
        for block in reader.evaluation_blocks(files, rank=0, world_size=1, batch_size=rows):
            for batch in block:
                yield batch.images[:left], batch.labels[:left]
                left -= len(batch.labels)
                if left <= 0:
                    return
