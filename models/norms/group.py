"""Group normalization (Wu & He 2018), and layer normalization as its case of one group."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.norms.base import NormLayer
from models.norms.segments import are_fast, normalize_segments


class GroupNorm(NormLayer):
    """The layer computes ``y = weight * (x - mean) / sqrt(var + eps) + bias`` for each sample, with mean and biased
    variance over all positions and channels of a group (Wu & He 2018, equations 1, 2, 6 and 7).

    A group is C / ``groups`` neighbouring channels; weight and bias belong to a channel. With one group it is layer
    normalization (Ba et al. 2016, equation 3) with one scale and shift for each channel, as Wu & He compare it.

    Statistics are those of one sample alone, so the layer does the same in training and evaluation, for any batch size.
    Input and output have shape (N, C, ...) and any float dtype.

    Parameters
    ----------
    channels : int
        C.
    groups : int
        The number of groups, a divisor of C.
    per_position : bool
        Whether the statistics are those of one position by itself, over the channels of a group alone, for activations
        of shape (N, C, H, W). With one group it is the layer norm of Liu et al. (2022).
    affine
        The other parameters of `NormLayer`.

    Raises
    ------
    ValueError
        The groups do not divide the channels, or statistics would be those of a single number.
    """

    def __init__(self, channels: int, *, groups: int, per_position: bool = False, **affine):
        super().__init__(channels, **affine)
        if channels % groups:
            raise ValueError(f"{groups} groups do not divide {channels} channels")
        if per_position and groups == channels > 1:
            raise ValueError(
                f"{groups} groups of {channels} channels: one channel at one position is normalized to 0; use fewer "
                "groups (model.norm_groups)"
            )
        self.groups, self.per_position = groups, per_position

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.per_position:
            return self._at_positions(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        group_channels = self.channels // self.groups
        if x.ndim == 4 and are_fast(x, group_channels):  # torch's kernel would convert channels_last
            return normalize_segments(
                x, self.weight, self.bias, self.eps, segments=len(x), group_channels=group_channels
            ).y
        # Autocast on CUDA makes it float32.
        return F.group_norm(x, self.groups, self.weight, self.bias, self.eps).to(x.dtype)

    def _at_positions(self, x_nhwc: torch.Tensor) -> torch.Tensor:
        if self.groups == 1:
            y = F.layer_norm(x_nhwc, (self.channels,), self.weight, self.bias, self.eps)
        else:
            rows = x_nhwc.reshape(-1, self.channels)
            y = F.group_norm(rows, self.groups, self.weight, self.bias, self.eps).view(x_nhwc.shape)
        return y.to(x_nhwc.dtype)  # autocast makes it float32

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, groups={self.groups}"
