"""Batch normalization over the rows of all ranks: one sum over the ranks forward, one backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from models.norms.base import per_channel

SumOverRanks = Callable[[torch.Tensor], torch.Tensor]


class Synchronized(NamedTuple):
    """y : shaped and typed as x
    mean, variance : of all ranks' rows, float64 (C,); the variance is the biased one
    total : values of a channel on all ranks, float64 (1,)
    """

    y: torch.Tensor
    mean: torch.Tensor
    variance: torch.Tensor
    total: torch.Tensor


def normalize_over_ranks(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float, sum_over_ranks: SumOverRanks
) -> Synchronized:
    """Normalize x, of shape (N, C, ...), with the mean and variance of the rows of all ranks.

    Every rank has to call it, and its backward pass, as each of them sums over the ranks once: 2 C + 1 float64 numbers
    forward, 2 C backward. Ranks may have different numbers of rows, and one may have none.

    With g the gradient of the loss by the normalized values, and means over the values of a channel on all ranks, the
    gradient by the input is (Ioffe & Szegedy 2015, section 3, the chain rule solved)::

        dx = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(var + eps)

    The gradients by weight and bias are those of this rank's rows; the training sums them with all others.

    Raises
    ------
    ValueError
        A channel has only one value on all ranks together.
    """
    function = _OnCuda if x.is_cuda else _OnCpu
    return Synchronized(*function.apply(x, weight, bias, eps, sum_over_ranks))


class _OnCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, sum_over_ranks):
        moments = None
        if x.numel():
            axes = [0, *range(2, x.ndim)]
            moments = torch.var_mean(x if x.dtype == torch.float64 else x.float(), axes, correction=0)
        mean, variance, total = _of_all_ranks(x, moments, sum_over_ranks)
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


class _OnCuda(torch.autograd.Function):
    """By the kernels of torch's own SyncBatchNorm: they take bf16 and both memory formats as they are, and the host
    waits for nothing."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, sum_over_ranks):
        x = x.contiguous(memory_format=_memory_format(x))
        moments = None
        if x.numel():
            rank_mean, rank_inverse = torch.batch_norm_stats(x, eps)
            moments = rank_inverse.double() ** -2 - eps, rank_mean
        mean, variance, total = _of_all_ranks(x, moments, sum_over_ranks)
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean_, inverse = mean.to(dtype), (variance + eps).rsqrt().to(dtype)
        ctx.save_for_backward(x, weight, mean_, inverse, total.to(torch.int32))
        ctx.sum_over_ranks, ctx.has_bias = sum_over_ranks, bias is not None
        ctx.mark_non_differentiable(mean, variance, total)
        y = torch.batch_norm_elemt(x, weight, bias, mean_, inverse, eps) if x.numel() else torch.empty_like(x)
        return y, mean, variance, total

    @staticmethod
    def backward(ctx, grad_y, *_):
        x, weight, mean, inverse, total = ctx.saved_tensors
        sum_g = sum_gx = torch.zeros_like(mean)
        grad_weight = None if weight is None else torch.zeros_like(weight)
        grad_bias = torch.zeros_like(mean) if ctx.has_bias else None
        if x.numel():
            grad_y = grad_y.contiguous(memory_format=_memory_format(x))
            # Both sums are of the gradient by y, before the scale; the second is of grad_y * (x - mean).
            sum_g, sum_gx, by_weight, by_bias = torch.batch_norm_backward_reduce(
                grad_y, x, mean, inverse, weight, True, weight is not None, ctx.has_bias
            )
            grad_weight = by_weight if weight is not None else None
            grad_bias = by_bias if ctx.has_bias else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            sum_g, sum_gx = ctx.sum_over_ranks(torch.cat([sum_g, sum_gx])).chunk(2)
            grad_x = torch.zeros_like(x)
            if x.numel():
                grad_x = torch.batch_norm_backward_elemt(grad_y, x, mean, inverse, weight, sum_g, sum_gx, total)
        return grad_x, grad_weight, grad_bias, None, None


def _of_all_ranks(x, moments, sum_over_ranks):
    """Return mean and biased variance, float64 (C,), and the number of values of a channel, float64 (1,), of all ranks.

    Parameters
    ----------
    moments : biased variance and mean of this rank's rows; None where it has none
    """
    count = x.numel() // x.shape[1]
    sums = torch.zeros(2 * x.shape[1] + 1, dtype=torch.float64, device=x.device)
    if count:
        rank_var, rank_mean = (values.double() for values in moments)
        known = torch.full((1,), count, dtype=torch.float64, device=x.device)
        sums = torch.cat([rank_mean * count, (rank_var + rank_mean**2) * count, known])
    first, second, total = sum_over_ranks(sums).split([x.shape[1], x.shape[1], 1])
    if count <= 1 and total <= 1:  # a look at ``total`` would make the host wait for the device
        raise ValueError("batch norm over all ranks: there is only one value in a channel")
    mean = first / total
    return mean, (second / total - mean**2).clamp_(min=0), total


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
