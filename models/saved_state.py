"""What is saved of a network: its tensors, under each of their names, and how a new network takes them up."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

Tensors = Mapping[str, torch.Tensor]


def copies(network: nn.Module, *, weights: bool) -> dict[str, torch.Tensor]:
    """Return copies of the buffers that a network saves, under each name that they have there.

    Parameters
    ----------
    network : Module
        It stays as it is.
    weights : bool
        Whether its parameters come with them.
    """
    return {
        name: value.detach().clone()
        for name, value in network.state_dict(keep_vars=True).items()
        if isinstance(value, torch.Tensor) and (weights or not isinstance(value, nn.Parameter))
    }


def load_saved(network: nn.Module, tensors: Tensors) -> None:
    """Load what was saved of a network into one that is built alike.

    Checkpoints of earlier versions may hold buffers that a network does not save, which are left out; and of a tensor
    with several names, what was evaluated under the first one alone, which then counts for all.

    Raises
    ------
    RuntimeError
        Names or shapes are not those of the network.
    """
    make_buffers(network, tensors)
    first: dict[int, str] = {}
    own = {name: value for name, value in network.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    names = {name: first.setdefault(id(value), name) for name, value in own.items()}
    saved = without_unsaved(network, tensors)
    network.load_state_dict({name: saved.get(names.get(name, name), value) for name, value in saved.items()})


def without_unsaved(network: nn.Module, tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return the tensors without those of buffers that a network does not save (``persistent=False``)."""
    unsaved = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in network.named_modules(remove_duplicate=False)
        for name in module._non_persistent_buffers_set
    }
    return {name: value for name, value in tensors.items() if name not in unsaved}


def make_buffers(network: nn.Module, tensors: Tensors) -> None:
    """Give buffers that are None until a forward pass makes them the values of these names, where there are some."""
    device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
    for prefix, module in network.named_modules():
        for name, buffer in module._buffers.items():
            full_name = f"{prefix}.{name}" if prefix else name
            if buffer is None and full_name in tensors:
                module._buffers[name] = tensors[full_name].to(device, copy=True)
