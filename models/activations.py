"""Activations by name: what `model.activation` may say."""

from __future__ import annotations

from typing import Literal

from torch import nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def make_activation(name: str | None, *, default: str = "relu") -> nn.Module:
    """A new module for each place, so that a hook sees the activations of one place.

    name : of the settings; None takes the network's default
    """
    return ACTIVATIONS[name or default]()


def gain_of(name: str | None) -> Literal["relu", "sigmoid", "tanh"]:
    """Whose gain torch.nn.init is to take for the initial weights; gelu and silu approach relu, and take its."""
    return "sigmoid" if name == "sigmoid" else "tanh" if name == "tanh" else "relu"
