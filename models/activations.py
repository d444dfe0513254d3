"""Activations by name: what `model.activation` may say."""

from __future__ import annotations

from typing import Literal

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def make_activation(name: str | None, *, default: str = "relu") -> nn.Module:
    """Return a new activation module.

    A network calls this once for each place, so that a forward hook sees the activations of one place alone.

    Parameters
    ----------
    name : str or None
        A key of `ACTIVATIONS`; None takes the default.
    default : str
        The activation that the network uses where the settings name none.
    """
    return ACTIVATIONS[name or default]()


def initialization_gain(name: str | None) -> Literal["relu", "sigmoid", "tanh"]:
    """Return the nonlinearity whose gain `torch.nn.init` takes for the initial weights.

    relu6 is relu up to 6, and gelu and silu approach relu for large inputs, so they take its gain.
    """
    return "sigmoid" if name == "sigmoid" else "tanh" if name == "tanh" else "relu"
