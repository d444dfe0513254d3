"""Small trainings for tests that run on the CPU and on a GPU."""

from __future__ import annotations

import contextlib

import torch

from pipeline.config.augment import AugmentSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.training import checkpoint
from pipeline.training.job import Job, identity

AUGMENT = AugmentSettings(flip=True, shift=1, cutout=3)
PHOTOGRAPHS = AugmentSettings(
    crop_scale=0.2, flip="alternating", brightness=0.4, contrast=0.4, saturation=0.4, mixup=0.2, cutmix=1.0
)


def make_job(dataset, folder, model=None, **changes):
    settings = {"epochs": 2, "batch_size": 32, "lanes": 4, "evaluate_on": "train", "evaluation_batch_size": 100,
                "learning_rate": 0.05, "augment": AUGMENT}  # fmt: skip
    model = {"network": "resnet", "depth": 8, "width": 8, **(model or {})}
    return Job(
        dataset, str(folder), ModelSettings(**model), TrainSettings(**{**settings, **changes}),
        checkpoint=CheckpointSettings(every_steps=5),
    )  # fmt: skip


def newest(job):
    return checkpoint.load_newest(f"{job.folder}/checkpoints", identity=identity(job), device=torch.device("cpu"))


@contextlib.contextmanager
def no_waiting():
    """torch refuses every call within the block that would make the host wait for the device."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def assert_same_end(one, other):
    """Two trainings have ended with the same bits, and found the same on the way."""
    one, other = newest(one), newest(other)
    for name, tensor in one["model"].items():
        assert torch.equal(tensor, other["model"][name]), name
    assert one["progress"]["curve"] == other["progress"]["curve"]
