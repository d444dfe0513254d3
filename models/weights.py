"""Weights that another training has left, taken up by a network: by name, with a new head where the classes differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from models.build import build_before_swap
from models.fold import by_reason
from models.saved_state import Tensors, make_buffers, without_unsaved
from models.swap import with_norm
from pipeline.config.import_path import KEEP
from pipeline.config.model import ModelSettings

_COUNT = "num_batches_tracked"  # torch's batch norm writes it, and nothing needs it
_WRAPPERS = ("model", "state_dict")  # keys under which checkpoints keep the weights
_LISTED = 3  # parameters that a message names


def tensors_of(loaded: object) -> dict[str, torch.Tensor]:
    """Return the tensors of a file by the names that the network's author gave them.

    The file may be a checkpoint, of sparknorm or of another program, that keeps the weights under ``model`` or
    ``state_dict``; what sparknorm and DistributedDataParallel put before the names is taken off.

    Raises
    ------
    ValueError
        It holds something else than tensors by name.
    """
    for key in _WRAPPERS:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not loaded:
        raise ValueError(f"it holds a {type(loaded).__name__}, and no tensors by name")
    other = next((name for name, value in loaded.items() if not isinstance(value, torch.Tensor)), None)
    if other is not None:
        raise ValueError(f"it holds a {type(loaded[other]).__name__} under {other!r}, and must hold tensors by name")
    named = {str(name): value for name, value in loaded.items()}
    if all(name.startswith("module.") for name in named):
        named = {name.removeprefix("module."): value for name, value in named.items()}
    if {"0.scale", "0.shift"} <= named.keys() and all(name.startswith(("0.", "1.")) for name in named):
        named = {name.removeprefix("1."): value for name, value in named.items() if name.startswith("1.")}
    return named


def take_weights(
    model: nn.Sequential,
    settings: ModelSettings,
    tensors: Tensors,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    head: str | None,
) -> tuple[str, ...]:
    """Give a network weights by their names.

    The file's normalization may be another one: where it does not fit as it is, it is loaded into the network as it is
    with batch norm, whose layers `models.with_norm` then replaces.

    Parameters
    ----------
    model : Sequential
        What `models.build_model` has returned for these settings, images and classes.
    tensors : mapping of str to Tensor
        See `tensors_of`.
    head : str or None
        The name of the head in the network (see `models.head`). It stays as it is where the file has none, or one with
        another number of outputs.

    Returns
    -------
    tuple of str
        What a person should know, as sentences.

    Raises
    ------
    ValueError
        The weights do not fit; the message names the first parameters that do not, with their shapes.
    """
    network = model[1]
    make_buffers(network, tensors)
    direct = _match(network, tensors, head)
    if direct.fits:
        _load(network, direct)
        return direct.notes(num_classes)
    if settings.norm == KEEP:
        raise ValueError(direct.problem())
    before = build_before_swap(settings, image_shape=image_shape, num_classes=num_classes)
    match = _match(before, tensors, head)
    if not match.fits:
        raise ValueError(min(direct, match, key=_Match.problems).problem())
    _load(before, match)
    swapped = with_norm(before, settings, inputs=torch.zeros(2, *image_shape))
    learned = {name: value for name, value in swapped.network.state_dict().items() if name not in match.new_head}
    carried = _match(network, learned, head)
    if not carried.fits:
        raise ValueError(f"with model.norm {settings.norm} in the place of its batch norm, {carried.problem()}")
    _load(network, carried)
    return (*match.notes(num_classes), *_lost(settings, tensors, network, swapped.notes))


def _lost(settings: ModelSettings, tensors: Tensors, network: nn.Module, changes: Mapping[str, str]) -> list[str]:
    """What the swap of norms has left out or changed."""
    notes = []
    count = sum(name.endswith(".running_mean") for name in tensors)
    if count and not any(".running_" in f".{name}" for name, _ in network.named_buffers()):
        notes.append(f"running statistics of {count} layers are left out: {settings.norm} keeps none")
    if changes:
        notes.append(f"{settings.norm} in the place of batch norm: {by_reason(dict(changes))}")
    return notes


class _Match(NamedTuple):
    """The tensors of a file and of a network, side by side.

    loaded : tensors to load, by name
    new_head : names of the head's parameters that stay as they are, with the shape in the file, if it has them
    no_statistics : names of running statistics that the file lacks, which stay as they are
    wrong, missing, extra : what does not fit, each with words that say so
    """

    loaded: dict[str, torch.Tensor]
    new_head: dict[str, tuple[int, ...] | None]
    no_statistics: list[str]
    wrong: list[str]
    missing: list[str]
    extra: list[str]
    names: int

    @property
    def fits(self) -> bool:
        return bool(self.loaded) and not (self.wrong or self.missing or self.extra)

    def problems(self) -> int:
        return len(self.wrong) + len(self.missing) + len(self.extra)

    def notes(self, num_classes: int) -> tuple[str, ...]:
        notes = []
        if self.new_head:
            name = next(iter(self.new_head)).rpartition(".")[0]
            shape = next(iter(self.new_head.values()))
            why = "the file has none" if shape is None else f"{num_classes} classes here, {shape[0]:,} in the file"
            notes.append(f"the head {name} is new: {why}")
        if self.no_statistics:
            layers = len({name.rpartition(".")[0] for name in self.no_statistics})
            notes.append(f"running statistics of {layers} layers start at mean 0 and variance 1: the file has none")
        return tuple(notes)

    def problem(self) -> str:
        """What does not fit, the first of each kind by name."""
        parts = [_listed(texts, what) for texts, what in (
            (self.wrong, "have another shape"),
            (self.missing, "are not in the file"),
            (self.extra, "are not in the network"),
        ) if texts]  # fmt: skip
        return f"it does not fit the network, of whose {self.names} tensors it has {len(self.loaded)}: " + "; ".join(
            parts or ["no name is the same"]
        )


def _listed(texts: list[str], what: str) -> str:
    more = f" and {len(texts) - _LISTED} more" if len(texts) > _LISTED else ""
    return f"{len(texts)} {what}: {', '.join(texts[:_LISTED])}{more}"


def _match(network: nn.Module, tensors: Tensors, head: str | None) -> _Match:
    own, tensors = network.state_dict(), without_unsaved(network, tensors)
    given = {name: value for name, value in tensors.items() if name in own or not name.endswith(_COUNT)}
    of_head = [name for name in own if head is not None and name.rpartition(".")[0] == head]
    new_head = _new_head(own, given, of_head)
    skipped = {*new_head, *(of_head if new_head else ())}
    with_statistics = any(name.rpartition(".")[2].startswith("running_") for name in given)
    loaded: dict[str, torch.Tensor] = {}
    no_statistics: list[str] = []
    wrong, missing = [], []
    for name, value in own.items():
        if name in skipped or (name.endswith(_COUNT) and name not in given):
            continue
        if name not in given:
            last = name.rpartition(".")[2]
            if not with_statistics and (last.startswith("running_") or last == "steps"):
                no_statistics.append(name)
            else:
                missing.append(f"{name} {tuple(value.shape)}")
        elif given[name].shape != value.shape:
            wrong.append(f"{name} {tuple(given[name].shape)} in the file, {tuple(value.shape)} in the network")
        else:
            loaded[name] = given[name]
    extra = [f"{name} {tuple(value.shape)}" for name, value in given.items() if name not in own]
    return _Match(loaded, new_head, no_statistics, wrong, missing, extra, len(own))


def _new_head(own: Tensors, given: Tensors, of_head: list[str]) -> dict[str, tuple[int, ...] | None]:
    """The head's parameters that the file lacks or has for another number of classes; none where all fit."""
    absent = [name for name in of_head if name not in given]
    other = [
        name
        for name in of_head
        if name in given and given[name].shape[1:] == own[name].shape[1:] and given[name].shape != own[name].shape
    ]
    if other and len(other) + len(absent) == len(of_head):
        return {name: tuple(given[name].shape) for name in other} | dict.fromkeys(absent)
    return dict.fromkeys(absent) if len(absent) == len(of_head) else {}


def _load(network: nn.Module, match: _Match) -> None:
    network.load_state_dict({**network.state_dict(), **match.loaded})
