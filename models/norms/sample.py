"""Norms with statistics of one sample alone: the same in training and evaluation, for any batch size."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.norms.base import NormLayer


class GroupNorm(NormLayer):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over the positions of all channels of a group, for each sample
    (Wu & He 2018, equations 1, 2, 6 and 7).

    A group is C / ``groups`` neighbouring channels; weight and bias are those of a channel, the variance is biased.
    With one group it is layer normalization (Ba et al. 2016, equation 3) with one scale and shift for each channel, as
    Wu & He compare it. Input and output (N, C, ...).

    Raises
    ------
    ValueError
        The groups do not divide the channels.
    """

    def __init__(self, channels: int, *, groups: int, **affine):
        super().__init__(channels, **affine)
        if channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels")
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"


class InstanceNorm(NormLayer):
    """y = weight * (x - mean) / sqrt(var + eps) + bias, over the positions of one channel, for each sample (Ulyanov et
    al. 2016, equation 2). The variance is biased.

    Input and output (N, C, ...) with more than one position in training.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
