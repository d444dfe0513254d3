"""Normalizations by name: name -> factory(num_channels) -> nn.Module for (N, C, H, W) activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from pipeline.config import ModelSettings


@dataclass(frozen=True)
class Norm:
    """What a network needs to know of a normalization.

    layer : factory(num_channels) of the layer
    shifts : whether the layer adds a learned shift, so that a bias before it would be redundant
    """

    layer: Callable[[int], nn.Module]
    shifts: bool


def _none(settings: ModelSettings) -> Norm:
    """No normalization: the identity. Convolutions get their biases back."""
    return Norm(lambda channels: nn.Identity(), shifts=False)


def _batch(settings: ModelSettings) -> Norm:
    """Batch normalization over (N, H, W), statistics of one rank (Ioffe & Szegedy 2015, algorithm 1).

    The batch is normalized with the biased variance; the running estimate takes the unbiased one.
    """
    return Norm(
        lambda channels: nn.BatchNorm2d(channels, eps=settings.norm_eps, momentum=settings.norm_momentum),
        shifts=True,
    )


def _group(settings: ModelSettings) -> Norm:
    """Group normalization over (C / G, H, W) of one sample (Wu & He 2018, section 3.2)."""
    groups = settings.norm_groups

    def layer(channels: int) -> nn.Module:
        if channels % groups:
            raise ValueError(
                f"model.norm_groups {groups} does not divide {channels} channels; "
                f"use a divisor of model.width {settings.width}"
            )
        return nn.GroupNorm(groups, channels, eps=settings.norm_eps)

    return Norm(layer, shifts=True)


def _layer(settings: ModelSettings) -> Norm:
    """Layer normalization over (C, H, W) of one sample (Ba et al. 2016): group norm with one group, which keeps
    one scale and shift for each channel as Wu & He (2018) compare it."""
    return Norm(lambda channels: nn.GroupNorm(1, channels, eps=settings.norm_eps), shifts=True)


NORMS: dict[str, Callable[[ModelSettings], Norm]] = {
    "none": _none,
    "batch": _batch,
    "group": _group,
    "layer": _layer,
}


def make_norm(settings: ModelSettings) -> Norm:
    """The normalization that the settings name, or an error that lists the known ones."""
    if settings.norm not in NORMS:
        raise ValueError(f"model.norm {settings.norm!r} is unknown; known are {', '.join(NORMS)}")
    return NORMS[settings.norm](settings)
