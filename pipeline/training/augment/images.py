"""What becomes of each image of a batch by itself: crop, flip, shift, colour, cutout, in this order."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pipeline.config.augment import AugmentSettings
from pipeline.training.augment import colour, crop, placement
from pipeline.training.augment.draws import BatchRows, array_on_device, on_device


def augment(
    images: torch.Tensor,
    settings: AugmentSettings,
    *,
    seed: int,
    step: int,
    lanes: Sequence[int],
    num_lanes: int,
    mean: Sequence[float] | None = None,
    size: tuple[int, int] | None = None,
    epoch: int = 0,
    ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Images cropped and resized, mirrored, shifted, in other colours, with a square cut out.

    Parameters
    ----------
    images : uint8 (rows, C, H, W), one rank's part of a global batch, lane after lane
    lanes, num_lanes : the lanes of this rank, and of the run
    mean : of each channel, in [0, 1]: the colour of what is cut out; None is black
    size : height and width that random crops are resized to; None is that of the images
    epoch, ids : the number of the epoch, and the images' ids, int64 (rows,) on the host; for ``flip: alternating``

    Returns
    -------
    uint8 (rows, C, height, width)
    """
    rows = BatchRows(seed, step, lanes, num_lanes, len(images) // len(lanes))
    if settings.crop_scale is not None:
        boxes = crop.draw_boxes(rows, (images.shape[2], images.shape[3]), settings.crop_scale, settings.crop_ratio)
        images = crop.resized_crops(
            images, array_on_device(boxes, images.device), size or (images.shape[2], images.shape[3])
        )
    images = _placed(images, settings, rows, epoch, ids)
    if settings.brightness or settings.contrast or settings.saturation:
        images = colour.jitter(images, settings, rows)
    if settings.cutout:
        generator = _generator(rows)
        _uniform(rows, generator, 3)  # those of flip and shift
        draws = on_device(_uniform(rows, generator, 2), images.device)
        images = placement.cut_out(images, draws, settings.cutout, mean or [0.0] * images.shape[1])
    return images


def _placed(
    images: torch.Tensor, settings: AugmentSettings, rows: BatchRows, epoch: int, ids: torch.Tensor | None
) -> torch.Tensor:
    """Images mirrored and shifted."""
    if not (settings.flip or settings.shift):
        return images
    draws = on_device(_uniform(rows, _generator(rows), 3), images.device)
    if settings.flip == "alternating":
        if ids is None:
            raise ValueError("train.augment.flip alternating needs the images' ids, and the batch has none")
        mirrored = array_on_device(placement.alternating(ids.numpy(), epoch, rows.seed), images.device)
        images = placement.mirror(images, mirrored)
    elif settings.flip:
        images = placement.mirror(images, draws[:, 0] < 0.5)
    return placement.shift(images, draws[:, 1:], settings.shift) if settings.shift else images


def _generator(rows: BatchRows) -> torch.Generator:
    """The one generator of flip, shift and cutout, which were the first."""
    return torch.Generator().manual_seed(rows.seed * 1_000_003 + rows.step)


def _uniform(rows: BatchRows, generator: torch.Generator, count: int) -> torch.Tensor:
    """The next numbers of each row, uniform in [0, 1): float32 (rows, count), on the host."""
    return torch.rand(rows.shape(count), generator=generator)[list(rows.lanes)].view(-1, count)
