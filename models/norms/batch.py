"""Batch normalization (Ioffe & Szegedy 2015, algorithms 1 and 2), with statistics of a rank, a lane, or the world."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch.nn import functional as F

from models.norms.base import MeanVarianceNorm, per_channel

Statistics = Literal["rank", "lane", "world"]


class BatchNorm(MeanVarianceNorm):
    """The layer computes ``y = weight * (x - mean) / sqrt(var + eps) + bias`` for each channel, with mean and variance
    over the batch and all positions (Ioffe & Szegedy 2015, algorithm 1).

    The batch is normalized with its biased variance; the running estimate takes the unbiased one, as torch's does.
    Input and output have shape (N, C, ...) and any float dtype. The rows of a batch are those of its lanes, one lane
    after the other, each N / ``lanes`` of them.

    Parameters
    ----------
    channels : int
        C, the size of axis 1.
    statistics : "rank", "lane" or "world"
        The rows whose statistics a batch is normalized with.

        rank : those of this process, as in DistributedDataParallel and Horovod.
        lane : those of each lane, apart from one another (ghost batch normalization, Hoffer et al. 2017): the same
            result for any number of ranks. The running estimates are means over lanes.
        world : those of all processes together (synchronized). Ranks may have different numbers of rows.
    options
        The other parameters of `RunningNorm`.

    Attributes
    ----------
    lanes : int
        The lanes in each of the batches to come; 1 makes ``lane`` the same as ``rank``.
    sum_over_ranks : callable or None
        A function that sums a tensor over all ranks, in place, and returns it; None makes ``world`` the same as
        ``rank``.

    Raises
    ------
    ValueError
        In training, a channel has only one value, or the lanes do not divide the rows.
    """

    def __init__(self, channels: int, *, statistics: Statistics = "rank", **options):
        super().__init__(channels, **options)
        self.statistics = statistics
        self.lanes = 1
        self.sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.statistics == "lane" and self.lanes > 1:
            return self._by_lane(x)
        if self.training and self.statistics == "world" and self.sum_over_ranks is not None:
            return self._over_ranks(x, self.sum_over_ranks)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _by_lane(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) % self.lanes:
            raise ValueError(f"batch norm by lane: {self.lanes} lanes do not divide a batch of {len(x)} rows")
        # A momentum of 1 leaves the batch's own mean and unbiased variance in the buffers.
        means = self.running_mean.new_zeros(self.lanes, self.channels)
        variances = torch.zeros_like(means)
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for part, mean, variance in zip(x.chunk(self.lanes), means, variances, strict=True)
        ]
        self._update(means.mean(0), variances.mean(0))
        return torch.cat(parts)

    def _over_ranks(self, x: torch.Tensor, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        y, mean, variance, count = _Synchronized.apply(x, self.weight, self.bias, self.eps, sum_over_ranks)
        self._update(mean, variance * (count / (count - 1)))
        return y

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        # Lanes are random parts of one shuffled split, and their variances are unbiased: the mean over lanes is the
        # same for any number of ranks.
        if self.statistics == "lane":
            return {name: (shares * values).sum(0) for name, values in running.items()}
        return super().join(running, shares)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, statistics={self.statistics}"


class _Synchronized(torch.autograd.Function):
    """Batch normalization over the rows of all ranks. Every rank has to call forward and backward, as each of them sums
    over the ranks once: 2 C + 1 float64 numbers forward, 2 C backward.

    With g the gradient of the loss by the normalized values, and means over the values of a channel on all ranks, the
    gradient by the input is (Ioffe & Szegedy 2015, section 3, the chain rule solved)::

        dx = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)

    The gradients by weight and bias are those of this rank's rows; the training sums them with all others.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, eps, sum_over_ranks):
        axes = [0, *range(2, x.ndim)]
        count = x.numel() // x.shape[1]
        sums = torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
        if count:
            rank_var, rank_mean = torch.var_mean(x if x.dtype == torch.float64 else x.float(), axes, correction=0)
            rank_mean = rank_mean.double()
            sums = torch.cat([rank_mean * count, (rank_var + rank_mean**2) * count, sums.new_tensor([count])])
        first, second, total = sum_over_ranks(sums).split([x.shape[1], x.shape[1], 1])
        if total <= 1:
            raise ValueError("batch norm over all ranks: there is only one value in a channel")
        mean = first / total
        variance = (second / total - mean**2).clamp_(min=0)
        # torch's kernel wants one dtype of all four; without scale and shift, statistics of bf16 rows stay float32.
        affine = weight if weight is not None else bias
        dtype = affine.dtype if affine is not None else torch.promote_types(x.dtype, torch.float32)
        mean_, variance_ = mean.to(dtype), variance.to(dtype)
        ctx.save_for_backward(x, weight, mean_, variance_, total)
        ctx.eps, ctx.sum_over_ranks, ctx.has_bias = eps, sum_over_ranks, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        return F.batch_norm(x, mean_, variance_, weight, bias, False, 0.0, eps), mean, variance, total

    @staticmethod
    def backward(ctx, grad_y, *_):
        x, weight, mean, variance, total = ctx.saved_tensors
        scale = torch.ones_like(mean) if weight is None else weight
        grad_x, sum_gx, sum_g = _backward_of_fixed_statistics(grad_y, x, scale, mean, variance, ctx.eps)
        if ctx.needs_input_grad[0]:
            sums = ctx.sum_over_ranks(torch.cat([sum_g.double(), sum_gx.double()]))
            mean_g, mean_gx = (part / total for part in sums.chunk(2))
            inverse = (variance.double() + ctx.eps).rsqrt()
            # scale * inverse * (mean_g + x_hat * mean_gx) is a + b * x in each channel; the two nearly cancel for rows
            # far from 0, so not in bf16.
            b = scale * inverse * inverse * mean_gx
            a = scale * inverse * mean_g - b * mean
            a, b = (per_channel(values, x).to(mean.dtype) for values in (a, b))
            grad_x = (grad_x - torch.addcmul(a, x, b)).to(x.dtype)
        return grad_x, None if weight is None else sum_gx, sum_g if ctx.has_bias else None, None, None


def _backward_of_fixed_statistics(grad_y, x, scale, mean, variance, eps):
    """Return ``scale * grad_y / sqrt(var + eps)``, and the sums of ``grad_y * x_hat`` and of ``grad_y`` over this
    rank's rows."""
    if not x.numel():  # torch's kernel divides by the number of rows
        return torch.zeros_like(x), torch.zeros_like(mean), torch.zeros_like(mean)
    grad_y = grad_y.contiguous(memory_format=_memory_format(x))
    return torch.ops.aten.native_batch_norm_backward(
        grad_y, x, scale, mean, variance, None, None, False, eps, [True] * 3
    )


def _memory_format(x: torch.Tensor) -> torch.memory_format:
    channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if channels_last else torch.contiguous_format
