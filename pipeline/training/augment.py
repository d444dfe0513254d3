"""Random changes to a batch of training images, on the device.

The draws depend on (seed, step) and on a row's place in the global batch alone: any number of workers sees the same
images, and a resumed run goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config.training import AugmentSettings


def augment(
    images: torch.Tensor,
    settings: AugmentSettings,
    *,
    seed: int,
    step: int,
    lanes: Sequence[int],
    num_lanes: int,
    mean: Sequence[float] | None = None,
) -> torch.Tensor:
    """Flipped and shifted images with a square cut out.

    Parameters
    ----------
    images : uint8 (rows, C, H, W), one rank's part of a global batch, lane after lane
    lanes, num_lanes : the lanes of this rank, and of the run
    mean : of each channel, in [0, 1]: the colour of what is cut out; None is black
    """
    if not (settings.flip or settings.shift or settings.cutout):
        return images
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)

    def draw(count: int) -> torch.Tensor:
        shape = (num_lanes, len(images) // len(lanes), count)
        return _on_device(torch.rand(shape, generator=generator)[list(lanes)].view(-1, count), images.device)

    draws = draw(3)
    if settings.flip:
        images = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    if settings.shift:
        images = _shift(images, draws[:, 1:], settings.shift)
    if settings.cutout:
        images = _cut_out(images, draw(2), settings.cutout, mean or [0.0] * images.shape[1])
    return images


def _on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on the device; from pinned memory, since the host would wait for any other copy to CUDA."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def _cut_out(images: torch.Tensor, draws: torch.Tensor, side: int, mean: Sequence[float]) -> torch.Tensor:
    """A square at a uniformly drawn centre, cut off at the borders, takes the mean colour, which normalization makes 0
    (DeVries & Taylor 2017, section 3.2)."""
    height, width = images.shape[2:]
    first = torch.stack([draws[:, 0] * height, draws[:, 1] * width], 1).long() - side // 2
    y, x = (torch.arange(length, device=images.device) for length in (height, width))
    rows = (y >= first[:, :1]) & (y < first[:, :1] + side)
    columns = (x >= first[:, 1:]) & (x < first[:, 1:] + side)
    square = (rows[:, :, None] & columns[:, None, :])[:, None]
    colour = _on_device(torch.tensor([round(255 * value) for value in mean], dtype=torch.uint8), images.device)
    return torch.where(square, colour.view(1, -1, 1, 1), images)


def _shift(images: torch.Tensor, draws: torch.Tensor, most: int) -> torch.Tensor:
    """Each image moved by whole pixels, uniformly in [-most, most] both ways: zero padding, then a random crop."""
    rows, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (most,) * 4)
    corner = (draws * (2 * most + 1)).long()
    y = corner[:, 0, None] + torch.arange(height, device=images.device)
    x = corner[:, 1, None] + torch.arange(width, device=images.device)
    row = torch.arange(rows, device=images.device)
    # Indices around a slice put the indexed axes first: (rows, H, W, C).
    return padded[row[:, None, None], :, y[:, :, None], x[:, None, :]].permute(0, 3, 1, 2)
