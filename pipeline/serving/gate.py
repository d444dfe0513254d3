"""Challenger and champion on the same images of the dataset: what each predicts, and how long an image takes it."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from pipeline.config.registry import RegistrySettings
from pipeline.data import Manifest
from pipeline.report.gate import Seen, judge
from pipeline.report.registration import GateReport
from pipeline.serving.predictor import Predictor
from pipeline.serving.served import ServedModelError
from pipeline.serving.trained import Trained, blocks_of
from pipeline.tracking.registry import Registry, RegistryError, Version

# Single images that are timed, after a few that warm up; the two models take turns, so that both see the same machine.
_TIMED, _WARM_UP = 60, 10


def load_version(registry: Registry, version: Version) -> Predictor:
    """The model of a version, downloaded and loaded on the CPU.

    Raises
    ------
    RegistryError
        It is no model of sparknorm.
    TrackingError
        It cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as local:
        try:
            return Predictor.load(registry.download(version.number, Path(local)))
        except ServedModelError as error:
            raise RegistryError(
                f"version {version.number} of {registry.model} cannot be held against another model: {error}; let "
                "another version have its alias, or set registry.model to another name"
            ) from error


def check_fits(model: str, version: str, predictor: Predictor, manifest: Manifest) -> list[str]:
    """What a person should know of a champion that is to be compared on a dataset, as sentences.

    Raises
    ------
    RegistryError
        It has other classes or another image shape than the dataset.
    """
    who = f"the champion, version {version} of {model},"
    if predictor.classes != tuple(manifest.classes):
        ours, theirs = set(manifest.classes), set(predictor.classes)
        differ = ", ".join(sorted(ours ^ theirs)[:5]) or "their order"
        raise RegistryError(
            f"{who} has {len(theirs)} classes and dataset {manifest.name} has {len(ours)}, which differ in: {differ}. "
            "Set registry.model to another name"
        )
    if predictor.image.shape != tuple(manifest.image.shape):
        raise RegistryError(
            f"{who} takes images of shape {list(predictor.image.shape)}, and dataset {manifest.name} has "
            f"{list(manifest.image.shape)}. Set registry.model to another name"
        )
    made = manifest.preparation
    if made and (predictor.image.resize, predictor.image.background) != (made.resize, made.background):
        return [
            f"The champion makes images by resize {predictor.image.resize}, and those of the dataset were made by "
            f"{made.resize}: here it saw the dataset's."
        ]
    return []


def check_split(manifest: Manifest, split: str) -> None:
    """Raise RegistryError where a dataset has no images to hold models against each other."""
    if split not in manifest.splits or not manifest.split(split).rows:
        some = sorted(name for name, each in manifest.splits.items() if each.rows)
        raise RegistryError(
            f"registry.split {split}: dataset {manifest.name} has no images of it; it has {', '.join(some)}"
        )


def gate_split(trained: Trained, settings: RegistrySettings) -> str:
    """The split whose images the models see."""
    return settings.split or trained.job.train.evaluate_on


def run_gate(
    trained: Trained,
    challenger: tuple[str, Predictor],
    champion: tuple[str, Predictor] | None,
    settings: RegistrySettings,
) -> GateReport:
    """Show both the first images of the split, and judge what they say.

    Parameters
    ----------
    trained : whose dataset the images are of
    challenger, champion : version and model
    """
    split = gate_split(trained, settings)
    models = [challenger, *([champion] if champion else [])]
    found: list[list[np.ndarray]] = [[] for _ in models]
    labels: list[np.ndarray] = []
    sample: list[torch.Tensor] = []
    for images, some in blocks_of(trained, split, settings.most_images):
        labels.append(some.numpy())
        sample += list(images[: max(0, _TIMED - len(sample))])
        for predictions, (_, predictor) in zip(found, models, strict=True):
            predictions.append(predictor.probabilities(images).argmax(axis=1))
    seconds = _seconds([predictor for _, predictor in models], torch.stack(sample))
    seen = [
        Seen(version, np.concatenate(predictions), 1000 * time_of_one)
        for (version, _), predictions, time_of_one in zip(models, found, seconds, strict=True)
    ]
    return judge(
        np.concatenate(labels), seen[0], seen[1] if champion else None,
        split=split, classes=trained.manifest.classes, settings=settings,
    )  # fmt: skip


def _seconds(models: list[Predictor], images: torch.Tensor) -> list[float]:
    """Median seconds of a single image, of each model."""
    taken: list[list[float]] = [[] for _ in models]
    for number in range(_WARM_UP + _TIMED):
        image = images[number % len(images)][None]
        for seconds, model in zip(taken, models, strict=True):
            started = time.perf_counter()
            model.probabilities(image)
            seconds.append(time.perf_counter() - started)
    return [statistics.median(seconds[_WARM_UP:]) for seconds in taken]
