"""A network that does not begin from nothing: pretrained weights, frozen parts, a head with a rate of its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from models.freeze import freeze
from models.head import head_of, head_parameters
from models.weights import take_weights
from pipeline.config.model import ModelSettings
from pipeline.config.optimizer import OptimizerSettings
from pipeline.data.manifest import Manifest
from pipeline.training.job import source_identity
from pipeline.training.network import network_for
from pipeline.training.weights_file import WeightsError, digest_of, read_weights

_NETWORK = "1."  # before the names of a network's parameters in what `build_model` returns


class PreparedNetwork(NamedTuple):
    """What the settings have made of a network.

    head : names of the head's parameters; none where no setting asks for the head, or it is not known
    notes : what a person should know, as sentences
    """

    head: frozenset[str]
    notes: tuple[str, ...]


# What was tried, by settings, sources and dataset: a study asks before each of its trials.
_TRIED: dict[tuple[str, ...], PreparedNetwork] = {}


def check_pretrained(model: ModelSettings, train: OptimizerSettings, manifest: Manifest) -> PreparedNetwork:
    """Prepare a network as every rank will, and throw it away; nothing where no setting asks for it.

    Raises
    ------
    ValueError
        See `prepare`.
    """
    if not (model.weights or model.freeze or _needs_head(train)):
        return PreparedNetwork(frozenset(), ())
    key = (
        model.model_dump_json(),
        str((train.head_learning_rate is None, train.clip_adaptive is None)),
        *source_identity(model.network).values(),
        digest_of(model),
        manifest.digest,
    )
    if key not in _TRIED:
        _TRIED[key] = prepare(network_for(model, manifest), model, train, manifest)
    return _TRIED[key]


def prepare(
    network: nn.Sequential, model: ModelSettings, train: OptimizerSettings, manifest: Manifest, *, digest: str = ""
) -> PreparedNetwork:
    """Give a network its pretrained weights, freeze what shall be frozen, and find its head.

    Parameters
    ----------
    network : that `network_for` has made of the same settings, on the CPU; it is changed in place
    digest : of the weights' file, as the driver has read it; empty where nobody says

    Raises
    ------
    WeightsError
        The file cannot be used, or does not fit the network.
    ValueError
        A prefix of ``model.freeze`` matches nothing, or a setting asks for a head that is not known.
    """
    classes, shape = len(manifest.classes), manifest.image.shape
    head, notes = None, []
    if model.weights or _needs_head(train):
        head = head_of(network, torch.zeros(1, *shape, dtype=torch.uint8), classes)
    if model.weights:
        tensors = read_weights(model, digest)
        own_head = head.removeprefix(_NETWORK) if head else None
        try:
            seen = model.input_shape(shape)
            remarks = take_weights(network, model, tensors, image_shape=seen, num_classes=classes, head=own_head)
        except ValueError as error:
            raise WeightsError(model.weights, str(error)) from error
        notes += [f"model.weights {model.weights}: {remark}" for remark in remarks]
    freeze(network[1], model.freeze)
    if _needs_head(train):
        _check_head(network, train, head, classes)
    return PreparedNetwork(head_parameters(network, head) if head else frozenset(), tuple(notes))


def _needs_head(train: OptimizerSettings) -> bool:
    return train.head_learning_rate is not None or train.clip_adaptive is not None


def _check_head(network: nn.Module, train: OptimizerSettings, head: str | None, classes: int) -> None:
    name = "head_learning_rate" if train.head_learning_rate is not None else "clip_adaptive"
    if head is None:
        raise ValueError(
            f"train.{name} asks which layer is the head, and the last layer with parameters that a forward pass calls "
            f"is no linear layer or convolution with {classes} outputs: set it to null"
        )
    frozen = not any(parameter.requires_grad for parameter in network.get_submodule(head).parameters())
    if frozen and train.head_learning_rate is not None:
        raise ValueError(
            f"train.head_learning_rate is for the head, {head.removeprefix(_NETWORK)}, which model.freeze freezes: "
            "set it to null, or take the head out of model.freeze"
        )
