"""Normalizations by name: what `model.norm` may say, and what networks need to know of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from models.norms.batch import BatchNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.power import PowerNorm
from models.norms.sample import GroupNorm, InstanceNorm
from models.norms.switchable import SwitchableNorm
from models.norms.weight_standardization import StandardizedConv2d, StandardizedLinear
from pipeline.config.training import ModelSettings


@dataclass(frozen=True)
class Norm:
    """What a network needs to know of a normalization.

    layer : factory(num_channels, **changes) of a layer for (N, C, ...); changes are those of `NormLayer`
    shifts : whether what comes before needs no bias: the layer adds a learned one, or removes any
    conv, linear : classes of the layers before it
    positions : whether it needs several positions of a channel, so that a vector (N, C) cannot be normalized
    running : whether it evaluates with statistics gathered in training
    """

    layer: Callable[..., nn.Module]
    shifts: bool
    conv: type[nn.Conv2d] = nn.Conv2d
    linear: type[nn.Linear] = nn.Linear
    positions: bool = False
    running: bool = False

    def tokens(self, features: int) -> nn.Module:
        """The layer for sequences (N, T, D): the statistics of group and layer norm are those of one token, of batch
        norm and its kin those of all tokens, of instance norm those of one sample's feature over its tokens."""
        return TokenNorm(self.layer(features), positions=self.positions)


class TokenNorm(nn.Module):
    """A norm layer for channels at axis 1, on sequences (N, T, D)."""

    def __init__(self, norm: nn.Module, *, positions: bool):
        super().__init__()
        self.norm, self.positions = norm, positions

    def forward(self, x_ntd: torch.Tensor) -> torch.Tensor:
        if self.positions:
            return self.norm(x_ntd.transpose(1, 2)).transpose(1, 2)
        return self.norm(x_ntd.flatten(0, 1)).view(x_ntd.shape)


def _make(kind: type[nn.Module], settings: ModelSettings, **own) -> Callable[..., nn.Module]:
    """Factory of layers with the options that all norms have, and some of their own."""
    options = {
        "eps": settings.norm_eps,
        "scale": settings.norm_scale,
        "shift": settings.norm_shift,
        "scale_init": settings.norm_scale_init,
        **own,
    }
    return lambda channels, **changes: kind(channels, **{**options, **changes})


def _none(settings: ModelSettings) -> Norm:
    """No normalization: the identity. Convolutions get their biases back."""
    return Norm(lambda channels, **_: nn.Identity(), shifts=False)


def _batch(settings: ModelSettings) -> Norm:
    layer = _make(BatchNorm, settings, momentum=settings.norm_momentum, statistics=settings.norm_statistics)
    return Norm(layer, shifts=True, running=True)


def _batch_renorm(settings: ModelSettings) -> Norm:
    own = {"momentum": settings.norm_momentum, "r_max": settings.norm_r_max, "d_max": settings.norm_d_max}
    return Norm(_make(BatchRenorm, settings, **own, **_warmup(settings)), shifts=True, running=True)


def _group(settings: ModelSettings) -> Norm:
    groups, make = settings.norm_groups, _make(GroupNorm, settings, groups=settings.norm_groups)

    def layer(channels: int, **changes) -> nn.Module:
        if channels % groups:
            raise ValueError(
                f"model.norm_groups {groups} does not divide {channels} channels; "
                f"use a divisor of model.width {settings.width}"
            )
        return make(channels, **changes)

    return Norm(layer, shifts=settings.norm_shift == "learned")


def _layer(settings: ModelSettings) -> Norm:
    return Norm(_make(GroupNorm, settings, groups=1), shifts=settings.norm_shift == "learned")


def _instance(settings: ModelSettings) -> Norm:
    return Norm(_make(InstanceNorm, settings), shifts=True, positions=True)


def _switchable(settings: ModelSettings) -> Norm:
    layer = _make(SwitchableNorm, settings, momentum=settings.norm_momentum)
    return Norm(layer, shifts=settings.norm_shift == "learned", positions=True, running=True)


def _weight_standardized_group(settings: ModelSettings) -> Norm:
    group = _group(settings)
    return Norm(group.layer, shifts=group.shifts, conv=StandardizedConv2d, linear=StandardizedLinear)


def _power(settings: ModelSettings) -> Norm:
    layer = _make(PowerNorm, settings, momentum=settings.norm_momentum, **_warmup(settings))
    return Norm(layer, shifts=settings.norm_shift == "learned", running=True)


def _warmup(settings: ModelSettings) -> dict[str, int]:
    return {} if settings.norm_warmup_steps is None else {"warmup_steps": settings.norm_warmup_steps}


NORMS: dict[str, Callable[[ModelSettings], Norm]] = {
    "none": _none,
    "batch": _batch,
    "batch_renorm": _batch_renorm,
    "group": _group,
    "layer": _layer,
    "instance": _instance,
    "switchable": _switchable,
    "weight_standardized_group": _weight_standardized_group,
    "power": _power,
}


def make_norm(settings: ModelSettings) -> Norm:
    """The normalization that the settings name.

    Raises
    ------
    ValueError
        There is no such norm; those that there are get listed.
    """
    if settings.norm not in NORMS:
        raise ValueError(f"model.norm {settings.norm!r} is unknown; known are {', '.join(NORMS)}")
    return NORMS[settings.norm](settings)
