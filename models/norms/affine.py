"""A scale and a shift for each channel without any statistics: what norms share, or what stays of one."""

from __future__ import annotations

import torch

from models.norms.base import NormLayer


class ScaleAndShift(NormLayer):
    """The layer computes ``y = weight * x + bias`` for each channel. Input and output have shape (N, C, ...)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._scale_and_shift(x)
