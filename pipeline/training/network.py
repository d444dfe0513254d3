"""The network of a training: built for the images of a dataset, on its device, its norms connected to the ranks."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn

from models import build_model
from models.recompute import recompute_in_backward
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.data.manifest import Manifest
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.hooks import CallHook


def network_for(model: ModelSettings, manifest: Manifest, *, seed: int = 0) -> nn.Sequential:
    """The network that these settings describe, for the images and classes of a dataset; see `models.build_model`.

    Parameters
    ----------
    seed : of the initial weights

    Raises
    ------
    ValueError
        Network, norm and images do not fit each other.
    """
    split = manifest.split("train")
    return build_model(
        model,
        image_shape=manifest.image.shape,
        num_classes=len(manifest.classes),
        mean=split.mean,
        std=split.std,
        seed=seed,
    )


def build_network(
    worker: Worker,
    model: ModelSettings,
    train: TrainSettings,
    manifest: Manifest,
    *,
    lanes: int,
    hook: CallHook = None,
) -> nn.Module:
    """The network that these settings describe, ready to train. Its initial weights are the same on every rank.

    Parameters
    ----------
    lanes : of this rank

    Raises
    ------
    ValueError
        The parts that a batch is accumulated in do not divide the rank's lanes, though norm statistics are by lane; the
        network cannot be compiled here; or it has no blocks to compute again.
    """
    parts = train.accumulate
    network = network_for(model, manifest, seed=train.seed).to(worker.device)
    if hook:
        hook("network_built", model=network)
    network.to(memory_format=memory_format(train))  # type: ignore[call-overload]
    if model.norm_statistics == "lane" and lanes % parts:
        raise ValueError(f"train.accumulate {parts} does not divide a worker's {lanes} lanes")
    norm_statistics.connect(network, worker, lanes=lanes // parts)
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
        There is no C++ compiler on a machine whose model is on CPU.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not any(shutil.which(name) for name in (compiler, "clang++")):
        raise ValueError(f"train.compile needs a C++ compiler on every worker: install {compiler}, or set it to false")
    import torch._inductor.config as inductor

    if device.type == "cpu":
        inductor.compile_threads = 1  # no pool of processes beside those of the other ranks
    model.compile()
