"""Normalization of equal segments of a batch, each by its own statistics: lanes of rows, or single samples.

On CUDA a few kernels do it, whatever the number of segments, where torch's own would be launched for one lane after the
other, or would convert channels_last: `segment_kernels` where Triton is installed, else whole-tensor operations. On CPU
torch's own kernels are faster.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import torch

try:
    from models.norms import segment_kernels
except ImportError:  # torch's builds for CPU bring no Triton
    segment_kernels = None  # type: ignore[assignment]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Segments(NamedTuple):
    """y : shaped, typed and laid out as x
    statistics : mean and biased variance of each segment, float32 (2, segments, C); no gradient flows through them
    """

    y: torch.Tensor
    statistics: torch.Tensor


def are_fast(x: torch.Tensor, group_channels: int = 1) -> bool:
    """Whether `normalize_segments` is the fast way for x: on CUDA, of shape (N, C), or (N, C, H, W) in channels_last.

    torch.compile has kernels of its own.
    """
    if not x.is_cuda or not x.numel() or torch.compiler.is_compiling():
        return False
    if group_channels & (group_channels - 1) or (segment_kernels and group_channels > segment_kernels.LARGEST_GROUP):
        return False
    return x.is_contiguous() if x.ndim == 2 else x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)


def normalize_segments(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    *,
    segments: int,
    group_channels: int = 1,
) -> Segments:
    """Compute ``weight * (x - mean) / sqrt(variance + eps) + bias`` with the statistics of each segment.

    With g the gradient by x_hat, and means over the values that share a mean, the gradient by x is (Ioffe & Szegedy
    2015, section 3, the chain rule solved)::

        dx = (g - mean(g) - x_hat * mean(g * x_hat)) / sqrt(variance + eps)

    Parameters
    ----------
    x : of shape (N, C), or (N, C, H, W) in channels_last
    segments : how many, of N / ``segments`` neighbouring samples each
    group_channels : neighbouring channels that share a mean and a variance
    """
    return Segments(*_Normalized.apply(x, weight, bias, eps, segments, group_channels))


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, segments, group_channels):
        y, statistics = _kernels(x).normalize(x, weight, bias, eps, segments, group_channels)
        ctx.save_for_backward(x, weight, statistics)
        ctx.has_bias, ctx.arguments = bias is not None, (eps, segments, group_channels)
        ctx.mark_non_differentiable(statistics)
        return y, statistics

    @staticmethod
    def backward(ctx, grad_y, _):
        x, weight, statistics = ctx.saved_tensors
        layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
        grad_y = grad_y.contiguous(memory_format=layout)
        dx, sums = _kernels(x).gradients(grad_y, x, statistics, weight, *ctx.arguments)
        grad_bias, grad_weight = sums.sum(1)
        return dx, None if weight is None else grad_weight, grad_bias if ctx.has_bias else None, None, None, None


def _kernels(x: torch.Tensor) -> Any:
    are_there = segment_kernels and x.is_cuda and x.dtype in _DTYPES and kernels_work(x.device)
    return segment_kernels if are_there else _WholeTensors


@functools.cache
def kernels_work(device: torch.device) -> bool:
    """Return whether Triton can launch `segment_kernels` here; a warning says why not.

    Before its first launch in a process Triton compiles a little C against Python's headers. Images of containers
    without a compiler, or without these headers, run torch but not that.
    """
    try:
        segment_kernels.normalize(torch.ones(12, 40, device=device), None, None, 1e-5, 3, 1)
    except torch.AcceleratorError:  # of something before: the device can no longer be used
        raise
    except Exception as error:  # noqa: BLE001 - of Triton, of the compiler, of the linker
        warnings.warn(
            f"Triton cannot compile on this machine ({type(error).__name__}: {error}): statistics by lane, group and "
            "instance norm take torch's own operations, which are slower; install a C compiler and Python's headers "
            "(gcc, python3-dev)",
            stacklevel=2,
        )
        return False
    return True


class _WholeTensors:
    """The functions of `segment_kernels` in torch's own operations."""

    @staticmethod
    def normalize(x, weight, bias, eps, segments, group_channels):
        rows = _exact(_rows(x, segments))
        variance, mean = torch.var_mean(rows, 1, correction=0)
        if group_channels > 1:  # the law of total variance
            of_channel, mean = mean, _group_mean(mean, group_channels)
            variance = _group_mean(variance + (of_channel - mean) ** 2, group_channels)
        y = (rows - mean.unsqueeze(1)) * (variance + eps).rsqrt().unsqueeze(1)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return _like(y.to(x.dtype), x), torch.stack([mean, variance])

    @staticmethod
    def gradients(grad, x, statistics, weight, eps, segments, group_channels):
        rows, grad = (_exact(_rows(values, segments)) for values in (x, grad))
        mean, variance = statistics.unsqueeze(2)
        inverse = (variance + eps).rsqrt()
        x_hat = (rows - mean) * inverse
        sums = torch.stack([grad.sum(1), (grad * x_hat).sum(1)])
        factor = torch.ones_like(sums[0, 0]) if weight is None else weight
        of_g, of_gx = _group_mean(sums * factor / rows.shape[1], group_channels).unsqueeze(2)
        return _like(((grad * factor - of_g - x_hat * of_gx) * inverse).to(x.dtype), x), sums


def _rows(x: torch.Tensor, segments: int) -> torch.Tensor:
    """The same memory as (segments, rows, channels)."""
    return (x.permute(0, 2, 3, 1) if x.ndim == 4 else x).reshape(segments, -1, x.shape[1])


def _like(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Rows in the shape of x, in the same memory."""
    return rows.view(len(x), *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2) if x.ndim == 4 else rows.view(x.shape)


def _group_mean(values: torch.Tensor, group_channels: int) -> torch.Tensor:
    """Each channel's value becomes the mean of its group's."""
    grouped = values.unflatten(-1, (-1, group_channels))
    return grouped.mean(-1, keepdim=True).expand_as(grouped).flatten(-2)


def _exact(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()
