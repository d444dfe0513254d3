"""Random changes to a batch of training images, on the device.

The draws depend on (seed, step) and on a row's place in the global batch alone: any number of workers sees the same
images, and a resumed run goes on with the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config import AugmentSettings


def augment(
    images: torch.Tensor,
    settings: AugmentSettings,
    *,
    seed: int,
    step: int,
    lanes: Sequence[int],
    num_lanes: int,
) -> torch.Tensor:
    """Flipped and shifted images.

    Parameters
    ----------
    images : uint8 (rows, C, H, W), one rank's part of a global batch, lane after lane
    lanes, num_lanes : the lanes of this rank, and of the run
    """
    if not settings.flip and not settings.shift:
        return images
    lane_batch = len(images) // len(lanes)
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    draws = torch.rand((num_lanes, lane_batch, 3), generator=generator)[list(lanes)].view(-1, 3).to(images.device)
    if settings.flip:
        images = torch.where((draws[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(3), images)
    if settings.shift:
        images = _shift(images, draws[:, 1:], settings.shift)
    return images


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
