"""Instance normalization (Ulyanov et al. 2016)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.norms.base import NormLayer


class InstanceNorm(NormLayer):
    """The layer computes ``y = weight * (x - mean) / sqrt(var + eps) + bias`` for each sample and channel, with mean
    and biased variance over the positions of that channel (Ulyanov et al. 2016, equation 2).

    Statistics are those of one sample alone, so the layer does the same in training and evaluation, for any batch size.
    Input and output have shape (N, C, ...), any float dtype, and in training more than one position.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
