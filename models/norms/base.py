"""What normalization layers share: a scale and a shift for each channel, and running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

Affine = Literal["learned", "fixed", "off"]


class NormLayer(nn.Module):
    """A layer on activations (N, C, ...) that ends with ``weight * normalized + bias`` for each channel.

    Parameters
    ----------
    channels : C
    eps : added to variances
    scale, shift : learned parameters, fixed at their initial values, or off (as if 1 and 0)
    scale_init : initial value of the scale; the shift starts at 0
    """

    weight: torch.Tensor | None
    bias: torch.Tensor | None

    def __init__(
        self,
        channels: int,
        *,
        eps: float = 1e-5,
        scale: Affine = "learned",
        shift: Affine = "learned",
        scale_init: float = 1.0,
    ):
        super().__init__()
        self.channels, self.eps = channels, eps
        self._add("weight", scale, scale_init)
        self._add("bias", shift, 0.0)

    def _add(self, name: str, kind: Affine, value: float) -> None:
        initial = torch.full((self.channels,), float(value))
        if kind == "fixed":
            self.register_buffer(name, initial)
        else:
            self.register_parameter(name, nn.Parameter(initial) if kind == "learned" else None)

    def _scale_and_shift(self, x_nc: torch.Tensor) -> torch.Tensor:
        if self.weight is not None:
            x_nc = x_nc * per_channel(self.weight, x_nc)
        if self.bias is not None:
            x_nc = x_nc + per_channel(self.bias, x_nc)
        return x_nc

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class RunningNorm(NormLayer):
    """A norm layer that evaluates with statistics gathered while training.

    Momentum is the weight of the new batch, torch's sense: ``running = (1 - momentum) * running + momentum * batch``.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, **affine):
        super().__init__(channels, **affine)
        self.momentum = momentum

    def running(self) -> dict[str, torch.Tensor]:
        """The buffers with statistics, (C,) each: those whose names begin with ``running_``."""
        return {name: buffer for name, buffer in self.named_buffers() if name.startswith("running_")}

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        """The statistics of all ranks' rows together.

        Parameters
        ----------
        running : each of `running`, stacked over the ranks: (W, C) float64
        shares : (W, 1) float64, each rank's share of the rows, 1 in total

        Returns
        -------
        dict of (C,) float64 tensors
        """
        raise NotImplementedError

    def set_population(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Take the mean and variance of a population, (C,) each, for the statistics gathered while training."""
        raise NotImplementedError

    def population(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean that evaluation subtracts and the square that it divides by the root of, (C,) each."""
        raise NotImplementedError

    def at_evaluation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer in evaluation mode is ``factor * x + addend``: both, (C,) each."""
        mean, square = self.population()
        factor = square.rsqrt()
        if self.weight is not None:
            factor = factor * self.weight
        addend = -mean * factor
        return factor, addend if self.bias is None else addend + self.bias


def per_channel(values_c: torch.Tensor, like_nc: torch.Tensor) -> torch.Tensor:
    """(C,) -> (1, C, 1, ...), to broadcast over (N, C, ...)."""
    return values_c.view(1, -1, *(1,) * (like_nc.ndim - 2))


def total_variance(
    means_wc: torch.Tensor, variances_wc: torch.Tensor, shares_w1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance of several groups together (law of total variance): the variance over all is the mean of the
    groups' variances plus the variance of their means, each group counting by its share."""
    mean = (shares_w1 * means_wc).sum(0)
    return mean, (shares_w1 * (variances_wc + (means_wc - mean) ** 2)).sum(0)
