"""Model folders of networks that were trained for a second, without Spark and MLflow."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from small_splits import write_splits

from pipeline.config.model import ModelSettings
from pipeline.config.settings import Settings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest
from pipeline.data.codec import FORMATS
from pipeline.data.manifest import Preparation
from pipeline.distributed.worker import alone
from pipeline.report.comparison import TrialResult
from pipeline.serving.model_folder import write_model_folder
from pipeline.serving.trained import Trained
from pipeline.training import checkpoint, fit
from pipeline.training.job import Job, identity
from pipeline.training.network import network_for

_MADE = {
    "resize": "crop", "background": 255, "max_pixels": 1_000_000, "jpeg_quality": 92, "formats": FORMATS,
    "max_bytes": 1 << 20,
}  # fmt: skip


def train_network(folder: Path, *, shape=(3, 12, 10), classes=3, norm="batch", **made: Any) -> Trained:
    """Train a small network for a few steps, on images whose brightness is their label."""
    random = np.random.default_rng(0)

    def images(rows: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(rows) % classes
        noise = random.integers(0, 150, (rows, *shape))
        return (noise + 30 * labels[:, None, None, None]).clip(0, 255).astype(np.uint8), labels

    dataset = str(folder / "dataset")
    splits = {"train": images(192), "test": images(70)}
    write_splits(dataset, splits, classes=classes, preparation=Preparation.model_validate(_MADE | made))
    manifest = load_manifest(dataset)
    train = TrainSettings(epochs=1, batch_size=32, lanes=4, learning_rate=0.05, warmup_epochs=0)
    job = Job(dataset, str(folder / "trial"), ModelSettings(depth=3, width=4, norm=norm), train)
    result = fit(alone("cpu"), job)
    state = checkpoint.load_newest(f"{job.folder}/checkpoints", identity=identity(job), device=torch.device("cpu"))
    network = network_for(job.model, manifest)
    network.load_state_dict(state["model"])
    found = TrialResult(**result.model_dump(), run_id="1" * 32)
    return Trained("small", network.eval().requires_grad_(False), job, manifest, result.checkpoint, found)


def write_model(folder: Path, **options: Any) -> tuple[Path, Trained]:
    """A model folder, and the training that is in it; options as those of `train_network`."""
    trained = train_network(folder, **options)
    write_model_folder(trained, Settings(name="small"), str(folder / "model"))
    return folder / "model", trained


def photo(height: int, width: int, *, orientation: int = 1, kind: str = "JPEG", seed: int = 0) -> bytes:
    """A smooth colour picture as a file, with the side up that EXIF says."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    picture = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    picture.save(buffer, kind, exif=exif)
    return buffer.getvalue()
