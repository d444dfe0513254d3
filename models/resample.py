"""Bilinear resizing with a filter that is as wide as the reduction, along one axis: which pixels, with which weights.

These are the numbers of Pillow's ``Image.resize(..., Resampling.BILINEAR)``: a triangle filter (Heckbert 1986, section
3.5.1) around the place of each output pixel, of half-width max(1, input / output), whose weights are made to sum to 1.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch


class Taps(NamedTuple):
    """The pixels that each output pixel is a weighted sum of, and their weights. Unused ones have a weight of 0.

    indices : int64 (..., out, taps)
    weights : float64 (..., out, taps), at least 0; those of an output pixel sum to 1
    """

    indices: torch.Tensor
    weights: torch.Tensor


def bilinear_taps(length: int, out: int) -> Taps:
    """Return the taps that resize an axis of ``length`` pixels to ``out``: tensors of shape (out, taps), on CPU."""
    zero, lengths = torch.zeros(1, dtype=torch.int64), torch.tensor([length])
    taps = bilinear_taps_of(zero, lengths, out, most=length)
    return Taps(taps.indices[0], taps.weights[0])


def bilinear_taps_of(first: torch.Tensor, length: torch.Tensor, out: int, *, most: int) -> Taps:
    """Return the taps that resize a part of an axis to ``out`` pixels, another part for each of several rows.

    Nothing waits for the device, and the same bits come out on each: every operation is rounded as IEEE 754 says.

    Parameters
    ----------
    first, length : int64 Tensor of shape (rows,)
        Where a row's part begins, and how many pixels it has; pixels outside of it have no weight.
    out : int
    most : int
        No length is larger. It decides the number of taps.

    Returns
    -------
    Taps
        Tensors of shape (rows, out, taps).
    """
    # By a tensor, since CUDA multiplies by the reciprocal of a number, which is rounded twice.
    scale = (length.double() / torch.full_like(length, out, dtype=torch.float64))[:, None]
    width = scale.clamp(min=1.0)
    centre = (torch.arange(out, device=length.device, dtype=torch.float64) + 0.5) * scale
    count = math.ceil(2 * max(1.0, most / out))
    begin = (centre - width + 0.5).long().clamp(min=0)  # towards zero, as a cast of C
    end = torch.minimum((centre + width + 0.5).long(), length[:, None])
    total = torch.zeros_like(centre)
    pixels, weights = [], []
    for tap in range(count):
        pixel = begin + tap
        distance = ((pixel.double() - centre) + 0.5) * (1.0 / width)
        weight = torch.where(pixel < end, (1.0 - distance.abs()).clamp(min=0.0), 0.0)
        total = total + weight
        pixels.append(torch.minimum(pixel, length[:, None] - 1) + first[:, None])
        weights.append(weight)
    return Taps(torch.stack(pixels, -1), torch.stack([weight / total for weight in weights], -1))
