"""A network of one's own (``model.network: mypackage.nets:build``) on the driver and on ranks: the same source, the
same parameters, and tried before anything is launched."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa
import torch
from torch import nn

from models.build import build_own
from models.imported import NetworkError, load, source_digest, source_place
from models.norms.kept import check_synchronized
from models.trial_batch import Bfloat16Error, check_recomputes, check_trains
from pipeline.config.cluster import WorkerSettings
from pipeline.config.model import ModelSettings
from pipeline.config.settings import OF_OUR_NETWORKS
from pipeline.config.training import TrainSettings
from pipeline.data.manifest import Manifest
from pipeline.training.network import network_for


class TriedNetwork(NamedTuple):
    """A network that can be trained.

    parameters : their number
    notes : what a person should know of it, as sentences
    """

    parameters: int
    notes: tuple[str, ...]


# What was tried, by settings, source and dataset: a study asks before each of its trials.
_TRIED: dict[tuple[str, ...], TriedNetwork] = {}


def check_own_network(
    model: ModelSettings,
    manifest: Manifest,
    train: TrainSettings,
    workers: WorkerSettings,
) -> TriedNetwork:
    """Build a network of an import path, and try it on one batch, as these workers would train it.

    Raises
    ------
    ValueError
        It cannot be imported, built, given the norm, or trained; the message names ``model.network``.
    """
    load(model.network)
    layout = (train.channels_last, train.bf16, train.gradient_checkpointing, workers.device, workers.count > 1)
    key = (model.model_dump_json(), source_digest(model.network), manifest.digest, *map(str, layout))
    if key not in _TRIED:
        tried = _try(model, manifest, train, workers)
        if train.gradient_checkpointing:
            network = network_for(model, manifest)
            shape, classes = manifest.image.shape, len(manifest.classes)
            check_recomputes(model.network, network, image_shape=shape, num_classes=classes)
        _TRIED[key] = tried
    return _TRIED[key]


def _try(model: ModelSettings, manifest: Manifest, train: TrainSettings, workers: WorkerSettings) -> TriedNetwork:
    shape, classes, path = manifest.image.shape, len(manifest.classes), model.network
    network = network_for(model, manifest)
    again, remarks = build_own(model, image_shape=shape, num_classes=classes)
    notes = [f"{path} with norm {model.norm}: {remark}" for remark in remarks]
    weights, others = list(network.parameters()), list(again.parameters())
    if len(weights) != len(others) or any(not torch.equal(*pair) for pair in zip(weights, others, strict=True)):
        notes.append(
            f"{path} starts from other weights each time, whatever train.seed: arms of a comparison do not start alike"
        )
    if workers.device == "cpu" and workers.count > 1:
        try:
            check_synchronized(network[1])
        except ValueError as error:
            raise NetworkError(path, str(error)) from None
    layout = {"channels_last": train.channels_last, "bf16": train.bf16}
    try:
        check_trains(path, network, image_shape=shape, num_classes=classes, **layout)
    except Bfloat16Error as error:
        if workers.device == "cpu":
            raise
        notes.append(f"{error}, unless workers have GPUs")
    unread = [name for name in OF_OUR_NETWORKS if getattr(model, name) != ModelSettings.model_fields[name].default]
    if unread:
        notes.append(f"model.{unread[0]} says nothing to {path}, which gets model.options alone")
    return TriedNetwork(sum(parameter.numel() for parameter in weights), tuple(notes))


def check_source(network: str, expected: str) -> str:
    """The digest of a network's source here.

    Parameters
    ----------
    expected : the driver's; empty where nobody says

    Raises
    ------
    NetworkError
        It differs, or the network cannot be imported here.
    """
    try:
        load(network)
        found = source_digest(network)
    except NetworkError as error:
        raise type(error)(network, f"on {socket.gethostname()}: {error.problem}") from error
    if expected and found != expected:
        raise NetworkError(
            network,
            f"{socket.gethostname()} imports other source, from {source_place(network)}, than the driver: make the zip "
            "of spark.py_files anew of the whole package, or install one version everywhere, in a new Spark session",
        )
    return found


def network_facts(model: ModelSettings, manifest: Manifest, *, seed: int) -> dict[str, str]:
    """What all ranks must build alike, by the names that a disagreement is told with."""
    network = network_for(model, manifest, seed=seed)
    parameters = list(network.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    return {f"the parameters of model.network {model.network}": f"{count:,} in {len(parameters)} tensors"}


def import_problems(batches: Iterator[pa.RecordBatch], network: str, expected: str) -> Iterator[pa.RecordBatch]:
    """The body of a small Spark task that imports a network on an executor: a row with the problem, if there is one."""
    for _ in batches:  # Spark keeps a Python worker, and the torch it has imported, only if its input is used up
        pass
    try:
        check_source(network, expected)
    except NetworkError as error:
        yield pa.RecordBatch.from_pydict({"problem": pa.array([str(error)])})


def export_problem(network: nn.Module, image_shape: tuple[int, int, int]) -> str:
    """Why `torch.export` cannot follow a network in evaluation mode, in one line; empty where it can."""
    example = torch.zeros(2, *image_shape, dtype=torch.uint8)
    try:
        torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    except Exception as error:  # noqa: BLE001 - of many kinds, by whatever the network does
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        return f"{type(error).__name__}: {text}"
    return ""
