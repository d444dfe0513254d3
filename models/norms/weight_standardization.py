"""Weight standardization (Qiao et al. 2019): layers whose weights have mean 0 and variance 1 for each output."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

EPS = 1e-5


def standardized(weight: torch.Tensor) -> torch.Tensor:
    """Return ``(W - mean) / sqrt(var + eps)``, mean and biased variance over all inputs of each output (Qiao et al.
    2019, equations 5 and 6).

    Parameters
    ----------
    weight : Tensor of shape (outputs, ...)

    Returns
    -------
    Tensor of the same shape and dtype
    """
    variance, mean = torch.var_mean(weight.flatten(1), 1, correction=0)
    shape = (-1, *(1,) * (weight.ndim - 1))
    return (weight - mean.view(shape)) * (variance + EPS).rsqrt().view(shape)


class StandardizedConv2d(nn.Conv2d):
    """A convolution that computes with `standardized` weights; its parameter is the weight before that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, standardized(self.weight), self.bias)


class StandardizedLinear(nn.Linear):
    """A linear layer that computes with `standardized` weights; its parameter is the weight before that."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, standardized(self.weight), self.bias)


class StandardizedConv1d(nn.Conv1d):
    """A convolution over one axis that computes with `standardized` weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, standardized(self.weight), self.bias)


class StandardizedConv3d(nn.Conv3d):
    """A convolution over three axes that computes with `standardized` weights."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x, standardized(self.weight), self.bias)


# Plain layers -> the same layers that standardize their weights.
STANDARDIZED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: StandardizedConv1d,
    nn.Conv2d: StandardizedConv2d,
    nn.Conv3d: StandardizedConv3d,
    nn.Linear: StandardizedLinear,
}
