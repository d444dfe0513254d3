"""The network of a training: built for the images of a dataset, on its device, its norms connected to the ranks."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from models import build_model
from models.layout import lay_out
from models.norms.kept import check_synchronized
from models.recompute import recompute_in_backward
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.data.manifest import Manifest
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.hooks import CallHook

# Mean and standard deviation of ImageNet's pixels, red, green and blue, as all published weights expect them.
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def network_for(model: ModelSettings, manifest: Manifest, *, seed: int = 0) -> nn.Sequential:
    """The network that these settings describe, for the images and classes of a dataset; see `models.build_model`.

    Parameters
    ----------
    seed : of the initial weights

    Raises
    ------
    ValueError
        Network, norm, images, ``model.mean`` and ``model.std`` do not fit each other.
    """
    split, shape = manifest.split("train"), manifest.image.shape
    return build_model(
        model,
        image_shape=shape,
        num_classes=len(manifest.classes),
        mean=mean_for(model, manifest),
        std=_of_channels("std", model.std, split.std, shape[0]),
        seed=seed,
    )


def mean_for(model: ModelSettings, manifest: Manifest) -> Sequence[float]:
    """The mean of each channel, in [0, 1], that the network of these settings subtracts."""
    return _of_channels("mean", model.mean, manifest.split("train").mean, manifest.image.shape[0])


def _of_channels(
    name: Literal["mean", "std"], given: str | tuple[float, ...] | None, of_split: Sequence[float], channels: int
) -> Sequence[float]:
    """The mean or the standard deviation of each channel that images are normalized with."""
    if given is None:
        return of_split
    numbers = IMAGENET[name] if isinstance(given, str) else given
    if len(numbers) != channels:
        raise ValueError(
            f"model.{name} {given if isinstance(given, str) else list(given)} has {len(numbers)} numbers, and the "
            f"images of the dataset have {channels} channels: give one for each, or null for those of the training "
            "split"
        )
    return numbers


def make_ready(
    worker: Worker,
    network: nn.Sequential,
    model: ModelSettings,
    train: TrainSettings,
    *,
    lanes: int,
    hook: CallHook = None,
) -> nn.Module:
    """Bring a network to a rank's device, ready to train, and return it.

    Parameters
    ----------
    network : that these settings describe, with weights that are the same on every rank
    lanes : of this rank

    Raises
    ------
    ValueError
        The parts that a batch is accumulated in do not divide the rank's lanes, though norm statistics are by lane, or
        are more than its rows; the network cannot be trained by several CPUs, or compiled here; or it has no blocks to
        compute again.
    """
    parts = train.accumulate
    network.to(worker.device)
    if hook:
        hook("network_built", model=network)
    lay_out(network, memory_format(train))
    if worker.world_size > 1 and worker.device.type == "cpu":
        check_synchronized(network)
    if model.norm_statistics == "lane" and lanes % parts:
        raise ValueError(f"train.accumulate {parts} does not divide a worker's {lanes} lanes")
    rows = train.global_batch // worker.world_size
    if parts > rows:
        raise ValueError(f"train.accumulate {parts} is more than a worker's {rows} images of a batch: use a divisor")
    norm_statistics.connect(network, worker, lanes=lanes // parts, parts=parts)
    if train.gradient_checkpointing:
        recompute_in_backward(network[1])
    if train.compile:
        compile_model(network, worker.device)
    return network


def memory_format(train: TrainSettings) -> torch.memory_format:
    """How the network's weights and its batches of images lie in memory."""
    return torch.channels_last if train.channels_last else torch.contiguous_format


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile what calling the model does; names of its parameters stay, and ``model.forward`` stays as it is.

    Raises
    ------
    ValueError
        There is no compiler on the machine: of C++ where the model is on CPU, of C, which Triton calls, on a GPU.
    """
    kind, names = ("C++", ("g++", "clang++")) if device.type == "cpu" else ("C", ("gcc", "clang", "cc"))
    own = os.environ.get("CXX" if device.type == "cpu" else "CC", names[0])
    if not any(shutil.which(name) for name in (own, *names)):
        raise ValueError(f"train.compile needs a {kind} compiler on every worker: install {own}, or set it to false")
    import torch._inductor.config as inductor

    if device.type == "cpu":
        inductor.compile_threads = 1  # no pool of processes beside those of the other ranks
    model.compile()
