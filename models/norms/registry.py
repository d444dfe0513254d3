"""Normalizations by name: what `model.norm` may say, and what a network needs to know of each."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from models.norms.batch import BatchNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.group import GroupNorm
from models.norms.instance import InstanceNorm
from models.norms.power import PowerNorm
from models.norms.switchable import SwitchableNorm
from models.norms.weight_standardization import StandardizedConv2d, StandardizedLinear
from pipeline.config.model import ModelSettings


@dataclass(frozen=True)
class Norm:
    """A normalization with the settings of one model: how to make its layers, and what goes before them.

    Attributes
    ----------
    layer : callable
        ``layer(channels, **changes)`` returns a new layer for activations of shape (N, C, ...). The changes are
        parameters of `NormLayer` that differ from the settings.
    replaces_bias : bool
        Whether the layer before needs no bias, because the norm adds a learned one or removes any.
    conv, linear : type
        The classes of the layers before a norm.
    needs_positions : bool
        Whether a channel has to have several positions, so that vectors of shape (N, C) cannot be normalized.
    keeps_statistics : bool
        Whether the layer evaluates with statistics gathered in training (`models.norms.base.RunningNorm`).
    over_channels : bool
        Whether the statistics are over several channels, so that ``layer`` takes the change ``per_position``.
    """

    layer: Callable[..., nn.Module]
    replaces_bias: bool
    conv: type[nn.Conv2d] = nn.Conv2d
    linear: type[nn.Linear] = nn.Linear
    needs_positions: bool = False
    keeps_statistics: bool = False
    over_channels: bool = False

    def tokens(self, features: int) -> nn.Module:
        """Return a new layer for sequences of shape (N, T, D), D = ``features``.

        Group and layer norm take their statistics over one token, batch norm and its kin over all tokens of the batch,
        and a norm that needs positions over one sample's feature in all its tokens.
        """
        return TokenNorm(self.layer(features), over_tokens=self.needs_positions)

    def at_positions(self, channels: int) -> nn.Module:
        """Return a new layer for activations of shape (N, C, H, W), C = ``channels``.

        Group and layer norm take their statistics over the channels at one position; the other norms are as ever.
        """
        return self.layer(channels, per_position=True) if self.over_channels else self.layer(channels)


class TokenNorm(nn.Module):
    """A norm layer on sequences of shape (N, T, D).

    Parameters
    ----------
    norm : Module
        A layer whose channels, D of them, are at axis 1.
    over_tokens : bool
        Whether tokens are positions of a sample; otherwise each token is a sample of its own.
    """

    def __init__(self, norm: nn.Module, *, over_tokens: bool):
        super().__init__()
        self.norm, self.over_tokens = norm, over_tokens

    def forward(self, x_ntd: torch.Tensor) -> torch.Tensor:
        if self.over_tokens:
            return self.norm(x_ntd.transpose(1, 2)).transpose(1, 2)
        return self.norm(x_ntd.flatten(0, 1)).view(x_ntd.shape)


def _layer_factory(layer: type[nn.Module], settings: ModelSettings, **options) -> Callable[..., nn.Module]:
    """Return a factory of layers with the parameters that all norms have, and these options."""
    parameters = {
        "eps": settings.norm_eps,
        "scale": settings.norm_scale,
        "shift": settings.norm_shift,
        "scale_init": settings.norm_scale_init,
        **options,
    }
    return lambda channels, **changes: layer(channels, **{**parameters, **changes})


def _none(settings: ModelSettings) -> Norm:
    """No normalization: an identity in its place, and convolutions have biases again."""
    return Norm(lambda channels, **_: nn.Identity(), replaces_bias=False)


def _batch(settings: ModelSettings) -> Norm:
    layer = _layer_factory(BatchNorm, settings, momentum=settings.norm_momentum, statistics=settings.norm_statistics)
    return Norm(layer, replaces_bias=True, keeps_statistics=True)


def _batch_renorm(settings: ModelSettings) -> Norm:
    layer = _layer_factory(
        BatchRenorm,
        settings,
        momentum=settings.norm_momentum,
        r_max=settings.norm_r_max,
        d_max=settings.norm_d_max,
        **_warmup(settings),
    )
    return Norm(layer, replaces_bias=True, keeps_statistics=True)


def _group(settings: ModelSettings) -> Norm:
    groups = settings.norm_groups
    make_layer = _layer_factory(GroupNorm, settings, groups=groups)

    def layer(channels: int, **changes) -> nn.Module:
        if channels % groups:
            raise ValueError(
                f"model.norm_groups {groups} does not divide {channels} channels; use a number that divides those of "
                f"every layer, such as {math.gcd(groups, channels)}"
            )
        return make_layer(channels, **changes)

    return Norm(layer, replaces_bias=settings.norm_shift == "learned", over_channels=True)


def _layer(settings: ModelSettings) -> Norm:
    layer = _layer_factory(GroupNorm, settings, groups=1)
    return Norm(layer, replaces_bias=settings.norm_shift == "learned", over_channels=True)


def _instance(settings: ModelSettings) -> Norm:
    return Norm(_layer_factory(InstanceNorm, settings), replaces_bias=True, needs_positions=True)


def _switchable(settings: ModelSettings) -> Norm:
    layer = _layer_factory(SwitchableNorm, settings, momentum=settings.norm_momentum)
    return Norm(layer, replaces_bias=settings.norm_shift == "learned", needs_positions=True, keeps_statistics=True)


def _weight_standardized_group(settings: ModelSettings) -> Norm:
    return replace(_group(settings), conv=StandardizedConv2d, linear=StandardizedLinear)


def _power(settings: ModelSettings) -> Norm:
    layer = _layer_factory(PowerNorm, settings, momentum=settings.norm_momentum, **_warmup(settings))
    return Norm(layer, replaces_bias=settings.norm_shift == "learned", keeps_statistics=True)


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
    """Return the normalization that ``settings.norm`` names.

    Raises
    ------
    ValueError
        No norm has this name; the message lists those that are known.
    """
    if settings.norm not in NORMS:
        raise ValueError(f"model.norm {settings.norm!r} is unknown; known are {', '.join(NORMS)}")
    return NORMS[settings.norm](settings)
