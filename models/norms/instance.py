"""Instance normalization (Ulyanov et al. 2016)."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from models.norms.base import NormLayer
from models.norms.segments import are_fast, normalize_segments


class InstanceNorm(NormLayer):
    """The layer computes ``y = weight * (x - mean) / sqrt(var + eps) + bias`` for each sample and channel, with mean
    and biased variance over the positions of that channel (Ulyanov et al. 2016, equation 2).

    Statistics are those of one sample alone, so the layer does the same in training and evaluation, for any batch size.
    Input and output have shape (N, C, ...), any float dtype, and more than one position.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim == 4 and x.shape[2] * x.shape[3] > 1 and are_fast(x):  # torch's kernel would convert channels_last
            return normalize_segments(x, self.weight, self.bias, self.eps, segments=len(x)).y
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)
