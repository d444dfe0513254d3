"""Parts of a network that training leaves as they are."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import nn


class Frozen(nn.Module):
    """What makes a module stay in evaluation mode, whatever mode the network around it is put in. It has no
    ``__init__`` of its own: a module becomes one by a change of its class."""

    def train(self, mode: bool = True) -> Frozen:
        """Put the module and all in it into evaluation mode."""
        return super().train(False)


def freeze(network: nn.Module, prefixes: Sequence[str]) -> None:
    """Let training leave the parameters below these names as they are.

    Layers there that keep running statistics normalize with them, in training too, and do not update them. Other layers
    go on as before: dropout still drops.

    Parameters
    ----------
    network : Module
        It is changed in place.
    prefixes : sequence of str
        Names of modules or parameters, as the network's author gave them: ``layer1`` is all of ``layer1``, and no part
        of ``layer10``.

    Raises
    ------
    ValueError
        A prefix is no such name, or nothing would be left to train.
    """
    for prefix in prefixes:
        _freeze(network, prefix)
    if prefixes and not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError("model.freeze leaves nothing to train: take out the part that shall learn")


def _freeze(network: nn.Module, prefix: str) -> None:
    parameters = [each for name, each in network.named_parameters(remove_duplicate=False) if _is_below(name, prefix)]
    modules = [each for name, each in network.named_modules(remove_duplicate=False) if _is_below(name, prefix)]
    if not parameters and not modules:
        names = [name for name, _ in network.named_modules()] + [name for name, _ in network.named_parameters()]
        near = difflib.get_close_matches(prefix, [name for name in names if name], n=1)
        parts = ", ".join(name for name, _ in network.named_children())
        hint = f"did you mean {near[0]}?" if near else f"its parts are {parts}"
        raise ValueError(f"model.freeze: the network has no {prefix!r}; {hint}")
    for parameter in parameters:
        parameter.requires_grad_(False)
    for module in modules:
        if any(name.startswith("running_") for name in module._buffers) and not isinstance(module, Frozen):
            kind = type(module)
            module.__class__ = type(kind.__name__, (Frozen, kind), {"__module__": kind.__module__})
            module.train()


def _is_below(name: str, prefix: str) -> bool:
    return f"{name}.".startswith(f"{prefix}.")
