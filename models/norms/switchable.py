"""Switchable normalization (Luo et al. 2019): learns how much of instance, layer and batch statistics to use."""

from __future__ import annotations

import torch
from torch import nn

from models.norms.base import MeanVarianceNorm, per_channel


class SwitchableNorm(MeanVarianceNorm):
    """The layer computes ``y = weight * (x - sum_k w_k mu_k) / sqrt(sum_k w'_k var_k + eps) + bias``, k of instance,
    layer and batch statistics (Luo et al. 2019, equation 3).

    w and w' are the softmax of three learned numbers each, which start equal (equation 5). All statistics come from
    those of the instances (equation 4); variances are biased. Evaluation takes running averages for the batch's part,
    the only statistics that the layer keeps. Input and output have shape (N, C, ...), any float dtype, and more than
    one position; computation is in float32, or in float64 for float64.

    Attributes
    ----------
    mean_weights, var_weights : Parameter of shape (3,) and dtype float32
        The numbers before the softmax, for instance, layer and batch.
    """

    def __init__(self, channels: int, **options):
        super().__init__(channels, **options)
        self.mean_weights = nn.Parameter(torch.zeros(3))
        self.var_weights = nn.Parameter(torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        var_in, mean_in = torch.var_mean(exact.flatten(2), 2, correction=0)  # (N, C)
        # Law of total variance: a difference of mean square and squared mean would cancel where the mean is large.
        var_of_means, mean_ln = torch.var_mean(mean_in, 1, correction=0, keepdim=True)
        var_ln = var_in.mean(1, keepdim=True) + var_of_means
        if self.training:
            var_of_means, mean_bn = torch.var_mean(mean_in, 0, correction=0)
            var_bn = var_in.mean(0) + var_of_means
            self._update(mean_bn, var_bn)
        else:
            mean_bn, var_bn = self.running_mean, self.running_var
        for_mean, for_var = self.mean_weights.softmax(0), self.var_weights.softmax(0)
        mean = for_mean[0] * mean_in + for_mean[1] * mean_ln + for_mean[2] * mean_bn
        variance = for_var[0] * var_in + for_var[1] * var_ln + for_var[2] * var_bn
        factor = (variance + self.eps).rsqrt()  # (N, C)
        if self.weight is not None:
            factor = factor * self.weight
        shape = (*mean.shape, *(1,) * (x.ndim - 2))
        y = (exact - mean.view(shape)) * factor.view(shape)  # the mean first: both products would be large
        return (y if self.bias is None else y + per_channel(self.bias, y)).to(x.dtype)

    def evaluation_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("switchable norm takes a part of its statistics from the sample itself")
