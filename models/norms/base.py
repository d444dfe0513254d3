"""What normalization layers share: a scale and a shift for each channel, and running statistics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn

Affine = Literal["learned", "fixed", "off"]


class NormLayer(nn.Module):
    """A layer on activations of shape (N, C, ...) that ends with ``weight * normalized + bias`` for each channel.

    Parameters
    ----------
    channels : int
        C, the size of axis 1.
    eps : float
        The number that is added to variances before their root is taken.
    scale, shift : "learned", "fixed" or "off"
        Whether weight and bias are parameters, buffers that keep their initial values, or None (as if 1 and 0).
    scale_init : float
        The initial value of the weight; the bias starts at 0.

    Attributes
    ----------
    weight, bias : Tensor of shape (C,) and dtype float32, or None
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
        self._register("weight", scale, scale_init)
        self._register("bias", shift, 0.0)

    def _register(self, name: str, kind: Affine, value: float) -> None:
        initial = torch.full((self.channels,), float(value))
        if kind == "fixed":
            self.register_buffer(name, initial)
        else:
            self.register_parameter(name, nn.Parameter(initial) if kind == "learned" else None)

    def _scale_and_shift(self, x_nc: torch.Tensor) -> torch.Tensor:
        return multiply_add(x_nc, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"


class RunningNorm(NormLayer):
    """A norm layer that evaluates with statistics gathered in training.

    Parameters
    ----------
    channels : int
        C, the size of axis 1.
    momentum : float
        The weight of the new batch, torch's sense: ``running = (1 - momentum) * running + momentum * batch``. Papers
        mostly write the weight of the old value.
    affine
        The other parameters of `NormLayer`.
    """

    def __init__(self, channels: int, *, momentum: float = 0.1, **affine):
        super().__init__(channels, **affine)
        self.momentum = momentum

    def running(self) -> dict[str, torch.Tensor]:
        """Return the buffers that hold statistics, of shape (C,) each: those whose names begin with ``running_``."""
        return {name: buffer for name, buffer in self.named_buffers() if name.startswith("running_")}

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the statistics that the rows of all ranks have together.

        Parameters
        ----------
        running : mapping of str to Tensor of shape (W, C) and dtype float64
            Each buffer of `running`, stacked over the W ranks.
        shares : Tensor of shape (W, 1) and dtype float64
            The share of each rank in the rows; the shares sum to 1.

        Returns
        -------
        dict of str to Tensor of shape (C,) and dtype float64
        """
        raise NotImplementedError

    def set_population(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        """Replace the statistics gathered in training by the mean and variance of a population, of shape (C,) each."""
        raise NotImplementedError

    def population(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the mean that evaluation subtracts and the square whose root it divides by, of shape (C,) each."""
        raise NotImplementedError

    def evaluation_affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factor and the addend, of shape (C,) each, with which the layer in evaluation mode computes
        ``factor * x + addend``.

        Raises
        ------
        ValueError
            The layer takes a part of its statistics from the sample, so that there are no such two numbers.
        """
        mean, square = self.population()
        factor = square.rsqrt()
        if self.weight is not None:
            factor = factor * self.weight
        addend = -mean * factor
        return factor, addend if self.bias is None else addend + self.bias


class MeanVarianceNorm(RunningNorm):
    """A norm layer whose statistics are a running mean and a running variance of each channel.

    Attributes
    ----------
    running_mean, running_var : Tensor of shape (C,) and dtype float32
        They start at 0 and 1.
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, channels: int, **options):
        super().__init__(channels, **options)
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        # torch's batch norm layers keep a count of batches, which is in every published file and of which nothing here
        # makes use; one of torch's own that is kept has it. The mapping is a copy that `load_state_dict` has made.
        if "num_batches_tracked" not in self._buffers:
            state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    @torch.no_grad()
    def _update(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), self.momentum)
        self.running_var.lerp_(variance.to(self.running_var.dtype), self.momentum)

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, variance = total_variance(running["running_mean"], running["running_var"], shares)
        return {"running_mean": mean, "running_var": variance}

    def set_population(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_var.copy_(variance)

    def population(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.running_mean, self.running_var + self.eps


def per_channel(values_c: torch.Tensor, like_nc: torch.Tensor) -> torch.Tensor:
    """Return ``values_c``, of shape (C,), as a view of shape (1, C, 1, ...) that broadcasts over (N, C, ...)."""
    return values_c.view(1, -1, *(1,) * (like_nc.ndim - 2))


def multiply_add(x_nc: torch.Tensor, factor_c: torch.Tensor | None, addend_c: torch.Tensor | None) -> torch.Tensor:
    """Return ``factor * x + addend`` for each channel in the dtype of x, in one pass where both are there.

    Parameters
    ----------
    factor_c, addend_c : Tensor of shape (C,), or None for 1 and 0
    """
    factor, addend = (
        None if values is None else per_channel(values, x_nc).to(x_nc.dtype) for values in (factor_c, addend_c)
    )
    if factor is None:
        return x_nc if addend is None else x_nc + addend
    return x_nc * factor if addend is None else torch.addcmul(addend, x_nc, factor)


def total_variance(
    means_wc: torch.Tensor, variances_wc: torch.Tensor, shares_w1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mean and the variance, of shape (C,) each, of several groups of rows together.

    By the law of total variance the variance of all rows is the mean of the groups' variances plus the variance of
    their means, where each group counts by its share of the rows.
    """
    mean = (shares_w1 * means_wc).sum(0)
    return mean, (shares_w1 * (variances_wc + (means_wc - mean) ** 2)).sum(0)
