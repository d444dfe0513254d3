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

    The input has shape (N, C, H, W) and any dtype, the output (N, C, size, size): of the same dtype where nothing is
    resized, else float32. It is resized by a triangle filter that is as wide as the reduction (`models.resample`).

    Parameters
    ----------
    share : float, optional
        The side of the square that is cut out, of the shorter side, above 0 and up to 1; None cuts out ``size``
        pixels, which are not resized.
    size : int
        Height and width of the output, in pixels.
    """

    def __init__(self, share: float | None, size: int):
        super().__init__()
        self.share, self.size = share, size
        self._taps: dict[tuple[int, torch.device], Taps] = {}

    def forward(self, images_nchw: torch.Tensor) -> torch.Tensor:
        height, width = images_nchw.shape[2:]
        if height == width == self.size:
            return images_nchw
        side = self.size if self.share is None else max(1, round(self.share * min(height, width)))
        top, left = (height - side) // 2, (width - side) // 2
        centre = images_nchw[:, :, top : top + side, left : left + side]
        if side == self.size:
            return centre
        taps = self._taps_on(side, centre.device)
        return _resized(_resized(centre, taps, 2), taps, 3)

    def _taps_on(self, side: int, device: torch.device) -> Taps:
        """Return the weights that resize ``side`` pixels, on a device; a copy to a GPU, for which the host waits, is
        made once. They are no buffers, so that states of networks have the same names with and without a crop."""
        if (side, device) in self._taps:
            return self._taps[side, device]
        with torch.inference_mode(False):
            taps = Taps(*(values.to(device) for values in bilinear_taps(side, self.size)))
        if not (torch.compiler.is_compiling() or torch.jit.is_tracing()):  # there are no numbers then
            self._taps[side, device] = taps
        return taps

    def extra_repr(self) -> str:
        return f"share={self.share}, size={self.size}"


def _resized(images: torch.Tensor, taps: Taps, axis: int) -> torch.Tensor:
    """Images resized along one axis."""
    shape = [-1 if number == axis else 1 for number in range(4)]
    total: torch.Tensor | None = None
    for index, weight in zip(taps.indices.unbind(-1), taps.weights.float().unbind(-1), strict=True):
        part = images.index_select(axis, index) * weight.view(shape)
        total = part if total is None else total + part
    assert total is not None
    return total
