"""Triton kernels of `segments`, for CUDA: torch's builds bring Triton along. Nothing else imports this file.

Memory is (segments, rows, channels), dense: tensors of shape (N, C), and of shape (N, C, H, W) in channels_last. All is
computed in float32 and summed in a fixed order, so that the same input gives the same bits. A program takes a part of
the rows of one segment and a block of channels; a group of channels, of a power of two, lies in one block. Launching
takes the host longer than most of them take the device, so they are few: those that need sums over all parts add them
up themselves.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Elements of a tile; tiles of a program that sums nothing; programs that a sum is cut into where there are rows enough.
_TILE, _TILES, _PROGRAMS = 4096, 4, 512
# CUDA's limit of a grid's second size.
_MOST_PARTS = 65_535
# The largest group of channels that fits a tile of a few rows.
LARGEST_GROUP = 1024


def normalize(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    segments: int,
    group_channels: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized values, shaped as x, and the mean and the biased variance of each: float32 (2, segments, C)."""
    rows, channels = _rows(x, segments), x.shape[1]
    cut, parts, partial = _sums(x, segments, group_channels)
    _sum_shifted[cut.grid](x, partial, rows, channels, cut.part_rows, **cut.blocks)
    y, statistics = torch.empty_like(x), partial.new_empty(2, segments, channels)
    cut = _cut(rows, channels, segments, group_channels)
    _normalize[cut.grid](
        x, partial, _or(weight, x), _or(bias, x), y, statistics, rows, channels, parts, cut.part_rows, eps,
        has_weight=weight is not None, has_bias=bias is not None, group=group_channels, **cut.blocks,
    )  # fmt: skip
    return y, statistics


def gradients(
    grad: torch.Tensor,
    x: torch.Tensor,
    statistics: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    segments: int,
    group_channels: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient by x, shaped as x, and the sums over each segment's rows of the gradient, and of the gradient times
    the normalized values: float32 (2, segments, C)."""
    rows, channels = _rows(x, segments), x.shape[1]
    cut, parts, partial = _sums(x, segments, group_channels)
    _sum_gradient[cut.grid](grad, x, statistics, partial, rows, channels, cut.part_rows, eps, **cut.blocks)
    dx, sums = torch.empty_like(x), torch.empty_like(statistics)
    cut = _cut(rows, channels, segments, group_channels)
    _input_gradient[cut.grid](
        grad, x, statistics, partial, _or(weight, x), dx, sums, rows, channels, parts, cut.part_rows, eps,
        has_weight=weight is not None, group=group_channels, **cut.blocks,
    )  # fmt: skip
    return dx, sums


class _Cut(NamedTuple):
    """How programs share the work.

    grid : segments, parts of their rows, blocks of channels
    part_rows : rows of a part, whole tiles
    blocks : rows and channels of a tile, as the kernels take them
    """

    grid: tuple[int, int, int]
    part_rows: int
    blocks: dict[str, int]


@functools.lru_cache(maxsize=1024)  # of a layer it is the same in each step, and takes the host as long as a launch
def _cut(rows: int, channels: int, segments: int, group_channels: int, programs: int | None = None) -> _Cut:
    block_c = max(group_channels, min(128, triton.next_power_of_2(channels)))
    block_m, columns = max(1, _TILE // block_c), triton.cdiv(channels, block_c)
    tiles = max(_TILES, triton.cdiv(triton.cdiv(rows, block_m), _MOST_PARTS))
    if programs is not None:
        tiles = triton.cdiv(rows, max(1, programs // (segments * columns)) * block_m)
    part_rows = min(tiles, triton.cdiv(rows, block_m)) * block_m
    return _Cut((segments, triton.cdiv(rows, part_rows), columns), part_rows, {"block_m": block_m, "block_c": block_c})


def _sums(x: torch.Tensor, segments: int, group_channels: int) -> tuple[_Cut, int, torch.Tensor]:
    """For two sums of each segment and channel: how they are cut, into how many parts, and the place of the parts."""
    cut = _cut(_rows(x, segments), x.shape[1], segments, group_channels, _PROGRAMS)
    parts = cut.grid[1]
    return cut, parts, torch.empty(2, segments, parts, x.shape[1], dtype=torch.float32, device=x.device)


def _rows(x: torch.Tensor, segments: int) -> int:
    return x.numel() // (x.shape[1] * segments)


def _or(values: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """A pointer is needed also where nothing is read."""
    return other if values is None else values


@triton.jit
def _group_mean(values, block_c: tl.constexpr, group: tl.constexpr):
    """Each channel's value becomes the mean of its group's."""
    if group > 1:
        grouped = tl.reshape(values, (block_c // group, group))
        means = tl.sum(grouped, 1) / group
        values = tl.reshape(tl.broadcast_to(means[:, None], (block_c // group, group)), (block_c,))
    return values


@triton.jit
def _add_parts(partial, segment, c, there, channels, parts, block_c: tl.constexpr):
    """Both sums of a segment and a block of channels."""
    half = tl.num_programs(0).to(tl.int64) * parts * channels
    first = tl.zeros((block_c,), tl.float32)
    second = tl.zeros((block_c,), tl.float32)
    for part in range(parts):
        at = partial + (segment * parts + part) * channels + c
        first += tl.load(at, mask=there, other=0)
        second += tl.load(at + half, mask=there, other=0)
    return first, second


@triton.jit
def _store_two(place, first, second, segments, channels, at, there):
    """Two values of a segment, or of a part of it, and a block of channels, in a tensor whose first size is 2."""
    tl.store(place + at, first, mask=there)
    tl.store(place + segments * channels + at, second, mask=there)


@triton.jit
def _sum_shifted(x, partial, rows, channels, part_rows, block_m: tl.constexpr, block_c: tl.constexpr):
    # Sums of x and of its square, of x less the first row: where the mean is far from 0 they would cancel.
    segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * block_c + tl.arange(0, block_c)
    there = c < channels
    x += segment * rows * channels
    shift = tl.load(x + c, mask=there, other=0).to(tl.float32)
    first = tl.zeros((block_m, block_c), tl.float32)
    second = tl.zeros((block_m, block_c), tl.float32)
    for start in range(0, part_rows, block_m):
        row = part * part_rows + start + tl.arange(0, block_m)
        inside = (row < rows)[:, None] & there[None, :]
        at = row.to(tl.int64)[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        value = tl.where(inside, value - shift[None, :], 0.0)
        first += value
        second += value * value
    all_parts = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    at = (segment * tl.num_programs(1) + part) * channels + c
    _store_two(partial, tl.sum(first, 0), tl.sum(second, 0), all_parts, channels, at, there)


@triton.jit
def _normalize(
    x, partial, weight, bias, y, statistics, rows, channels, parts, part_rows, eps,
    has_weight: tl.constexpr, has_bias: tl.constexpr, group: tl.constexpr,
    block_m: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * block_c + tl.arange(0, block_c)
    there = c < channels
    first, second = _add_parts(partial, segment, c, there, channels, parts, block_c)
    shift = tl.load(x + segment * rows * channels + c, mask=there, other=0).to(tl.float32)
    offset = first / rows
    of_channel = shift + offset
    mean = _group_mean(of_channel, block_c, group)
    # The law of total variance, where channels share one.
    within = tl.maximum(second / rows - offset * offset, 0.0)
    variance = _group_mean(within + (of_channel - mean) * (of_channel - mean), block_c, group)
    if part == 0:
        segments = tl.num_programs(0).to(tl.int64)
        _store_two(statistics, mean, variance, segments, channels, segment * channels + c, there)
    factor = 1.0 / tl.sqrt(variance + eps)
    if has_weight:
        factor = factor * tl.load(weight + c, mask=there, other=0).to(tl.float32)
    addend = tl.zeros((block_c,), tl.float32)
    if has_bias:
        addend = tl.load(bias + c, mask=there, other=0).to(tl.float32)
    for start in range(0, part_rows, block_m):
        row = part * part_rows + start + tl.arange(0, block_m)
        inside = (row < rows)[:, None] & there[None, :]
        at = (segment * rows + row.to(tl.int64))[:, None] * channels + c[None, :]
        value = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        value = (value - mean[None, :]) * factor[None, :] + addend[None, :]
        tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _sum_gradient(
    grad, x, statistics, partial, rows, channels, part_rows, eps, block_m: tl.constexpr, block_c: tl.constexpr
):
    segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * block_c + tl.arange(0, block_c)
    there = c < channels
    segments = tl.num_programs(0).to(tl.int64)
    mean = tl.load(statistics + segment * channels + c, mask=there, other=0)
    variance = tl.load(statistics + (segments + segment) * channels + c, mask=there, other=0)
    first = tl.zeros((block_m, block_c), tl.float32)
    second = tl.zeros((block_m, block_c), tl.float32)
    for start in range(0, part_rows, block_m):
        row = part * part_rows + start + tl.arange(0, block_m)
        inside = (row < rows)[:, None] & there[None, :]
        at = (segment * rows + row.to(tl.int64))[:, None] * channels + c[None, :]
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        first += g
        second += g * (tl.load(x + at, mask=inside, other=0).to(tl.float32) - mean[None, :])
    at = (segment * tl.num_programs(1) + part) * channels + c
    second_sum = tl.sum(second, 0) / tl.sqrt(variance + eps)
    _store_two(partial, tl.sum(first, 0), second_sum, segments * tl.num_programs(1), channels, at, there)


@triton.jit
def _input_gradient(
    grad, x, statistics, partial, weight, dx, sums, rows, channels, parts, part_rows, eps,
    has_weight: tl.constexpr, group: tl.constexpr, block_m: tl.constexpr, block_c: tl.constexpr,
):  # fmt: skip
    segment, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.program_id(2) * block_c + tl.arange(0, block_c)
    there = c < channels
    segments = tl.num_programs(0).to(tl.int64)
    mean = tl.load(statistics + segment * channels + c, mask=there, other=0)
    variance = tl.load(statistics + (segments + segment) * channels + c, mask=there, other=0)
    inverse = 1.0 / tl.sqrt(variance + eps)
    of_g, of_gx = _add_parts(partial, segment, c, there, channels, parts, block_c)
    if part == 0:
        _store_two(sums, of_g, of_gx, segments, channels, segment * channels + c, there)
    factor = tl.full((block_c,), 1.0, tl.float32)
    if has_weight:
        factor = tl.load(weight + c, mask=there, other=0).to(tl.float32)
    of_g = _group_mean(of_g * factor / rows, block_c, group)
    of_gx = _group_mean(of_gx * factor / rows, block_c, group)
    for start in range(0, part_rows, block_m):
        row = part * part_rows + start + tl.arange(0, block_m)
        inside = (row < rows)[:, None] & there[None, :]
        at = (segment * rows + row.to(tl.int64))[:, None] * channels + c[None, :]
        g = tl.load(grad + at, mask=inside, other=0).to(tl.float32)
        x_hat = (tl.load(x + at, mask=inside, other=0).to(tl.float32) - mean[None, :]) * inverse[None, :]
        value = (factor[None, :] * g - of_g[None, :] - x_hat * of_gx[None, :]) * inverse[None, :]
        tl.store(dx + at, value.to(dx.dtype.element_ty), mask=inside)
