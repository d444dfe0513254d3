"""Switchable normalization (Luo et al. 2019): learns how much of instance, layer and batch statistics to use."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from models.norms.base import RunningNorm, per_channel, total_variance


class SwitchableNorm(RunningNorm):
    """y = weight * (x - sum_k w_k mu_k) / sqrt(sum_k w'_k var_k + eps) + bias, k of instance, layer and batch
    (equation 3); w and w' are the softmax of three learned numbers each, which start equal (equation 5).

    All statistics come from those of the instances (equation 4). Variances are biased. Evaluation uses running averages
    for the batch's part. Input and output (N, C, ...) with more than one position; computed in float32, or float64 for
    float64.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, **options):
        super().__init__(channels, **options)
        self.mean_weights = nn.Parameter(torch.zeros(3))
        self.var_weights = nn.Parameter(torch.zeros(3))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        exact = x if x.dtype == torch.float64 else x.float()
        var_in, mean_in = torch.var_mean(exact.flatten(2), 2, correction=0)  # (N, C)
        # Law of total variance: a difference of mean square and squared mean would cancel where the mean is large.
        var_of_means, mean_ln = torch.var_mean(mean_in, 1, correction=0, keepdim=True)
        var_ln = var_in.mean(1, keepdim=True) + var_of_means
        if self.training:
            var_of_means, mean_bn = torch.var_mean(mean_in, 0, correction=0)
            var_bn = var_in.mean(0) + var_of_means
            with torch.no_grad():
                self.running_mean.lerp_(mean_bn.to(self.running_mean.dtype), self.momentum)
                self.running_var.lerp_(var_bn.to(self.running_var.dtype), self.momentum)
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

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, variance = total_variance(running["running_mean"], running["running_var"], shares)
        return {"running_mean": mean, "running_var": variance}

    def set_population(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def population(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the batch's part alone: what evaluation does with a sample depends on the sample."""
        return self.running_mean, self.running_var + self.eps

    def at_evaluation(self) -> tuple[torch.Tensor, torch.Tensor]:
        raise ValueError("switchable norm takes a part of its statistics from the sample itself")
