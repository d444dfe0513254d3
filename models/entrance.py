"""What images pass before a network's first layer: the centre is cut out where they are too large, and normalized."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.resample import Taps, bilinear_taps


class Normalize(nn.Module):
    """The layer turns uint8 images into float images that have mean 0 and standard deviation 1 in each channel, over
    the training split. Both have shape (N, C, H, W).

    Parameters
    ----------
    mean, std : sequence of C floats
        Mean and standard deviation of pixel values scaled to [0, 1], as the manifest states them.
    crop : Module, optional
        What cuts the centre out of images before.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float], crop: nn.Module | None = None):
        super().__init__()
        scale = torch.tensor([1 / (255 * max(s, 1e-6)) for s in std])
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", (torch.tensor(list(mean)) * 255 * scale).view(1, -1, 1, 1))
        self.scale: torch.Tensor
        self.shift: torch.Tensor
        self.crop = crop

    def forward(self, images_nchw: torch.Tensor) -> torch.Tensor:
        if self.crop is not None:
            images_nchw = self.crop(images_nchw)
        return images_nchw.to(self.scale.dtype) * self.scale - self.shift


class CentreCrop(nn.Module):
    """The layer cuts the centre out of images and resizes it to the size that the network takes. Images that have this
    size already, such as random crops in training, pass as they are.

    The input has shape (N, C, H, W) and any dtype, the output (N, C, *size): of the same dtype where nothing is
    resized, else float32. The centre is the largest rectangle of the output's proportions that fits, times ``share``;
    it is resized by a triangle filter that is as wide as the reduction (`models.resample`).

    Parameters
    ----------
    share : float, optional
        The share, above 0 and up to 1, of the shorter side; None cuts out ``size`` pixels, which are not resized.
    size : tuple of 2 ints
        Height and width of the output, in pixels.
    """

    def __init__(self, share: float | None, size: tuple[int, int]):
        super().__init__()
        self.share, self.size = share, tuple(size)

    def forward(self, images_nchw: torch.Tensor) -> torch.Tensor:
        stored = tuple(images_nchw.shape[2:])
        if stored == self.size:
            return images_nchw
        box = self.size
        if self.share is not None:
            factor = self.share * min(side / out for side, out in zip(stored, self.size, strict=True))
            box = tuple(min(side, max(1, round(out * factor))) for side, out in zip(stored, self.size, strict=True))
        (top, left), (height, width) = ((side - part) // 2 for side, part in zip(stored, box, strict=True)), box
        centre = images_nchw[:, :, top : top + height, left : left + width]
        for axis, (part, out) in enumerate(zip(box, self.size, strict=True), 2):
            if part != out:
                centre = _resized(centre, bilinear_taps(part, out), axis)
        return centre

    def extra_repr(self) -> str:
        return f"share={self.share}, size={self.size}"


def _resized(images: torch.Tensor, taps: Taps, axis: int) -> torch.Tensor:
    """Images resized along one axis."""
    shape = [-1 if number == axis else 1 for number in range(4)]
    total: torch.Tensor | None = None
    for index, weight in zip(taps.indices.unbind(-1), taps.weights.float().unbind(-1), strict=True):
        part = images.index_select(axis, index.to(images.device)) * weight.to(images.device).view(shape)
        total = part if total is None else total + part
    assert total is not None
    return total
