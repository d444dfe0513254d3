"""The head of a network: the layer that makes the logits. This is the one place that says which one it is."""

from __future__ import annotations

import torch
from torch import nn

from models.modes import evaluating

_HEADS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def head_of(model: nn.Module, inputs: torch.Tensor, num_classes: int) -> str | None:
    """Return the name of a network's head, whatever its author called it.

    It is the layer with parameters that the forward pass calls last, in evaluation, if that is a linear layer or a
    convolution with an output for each class.

    Parameters
    ----------
    model : Module
        From the inputs to logits; it stays as it is.
    inputs : Tensor
        A batch that the network takes, on its device.
    num_classes : int

    Returns
    -------
    str or None
        None where the last layer is of another kind, or has another number of outputs.
    """
    called: list[nn.Module] = []
    layers = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    hooks = [layer.register_forward_hook(lambda module, *_: called.append(module)) for layer in layers]
    cuda = [inputs.device] if inputs.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=cuda), torch.no_grad(), evaluating(model):
            model.forward(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    head = called[-1] if called else None
    if not isinstance(head, _HEADS):
        return None
    outputs = head.out_features if isinstance(head, nn.Linear) else head.out_channels
    return next(name for name, module in model.named_modules() if module is head) if outputs == num_classes else None


def head_parameters(model: nn.Module, head: str) -> frozenset[str]:
    """Return the names of a head's parameters as `Module.named_parameters` gives them: one that the head shares with
    another layer may have its name there."""
    own = {id(parameter) for parameter in model.get_submodule(head).parameters()}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in own)
