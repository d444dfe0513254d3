"""Small trainings for tests that run on the CPU and on a GPU."""

from __future__ import annotations

import torch

from pipeline.config.model import ModelSettings
from pipeline.config.training import AugmentSettings, CheckpointSettings, TrainSettings
from pipeline.training import checkpoint
from pipeline.training.job import Job, identity

AUGMENT = AugmentSettings(flip=True, shift=1, cutout=3)


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
