"""Random resized crops: a part of each image of random size, shape and place, resized to one size."""

from __future__ import annotations

import numpy as np
import torch

from models.resample import Taps, bilinear_taps_of
from pipeline.training.augment.draws import BatchRows, Purpose

# Sizes that are drawn before the largest part of the image that has an allowed shape is taken.
_TRIES = 10
# Weights are whole numbers of this many bits, so that sums of 8-bit values fit into 32: as Pillow has them.
_BITS = 22
# Values that are resized at once, by kind of device: what lies between weights and pixels takes 4 bytes each, which a
# CPU keeps in its cache: of 3 x 256 x 256, 4 images at once take it 1.0 ms each, and 64 at once 4.7 ms. But of small
# images as many as fit: each operation takes the host some microseconds.
_TOGETHER = {"cpu": 4 * 3 * 256 * 256}
_TOGETHER_ON_GPU = 64 * 3 * 256 * 256


def draw_boxes(rows: BatchRows, size: tuple[int, int], scale: float, ratio: float) -> np.ndarray:
    """The part of each image that is kept, as Szegedy et al. (2015, section 6) train: a share of the area, uniform from
    ``scale`` to 1, with a ratio of width to height whose logarithm is uniform from that of ``1 / ratio`` to that of
    ``ratio``, at a uniform place.

    Where ten draws do not fit into the image, it is the largest centred part whose shape is allowed.

    Parameters
    ----------
    size : height and width of the images

    Returns
    -------
    int64 (rows, 4) : top, left, height, width
    """
    height, width = size
    draws = rows.generator(Purpose.CROP).random(rows.shape(2 * _TRIES + 2))
    area = height * width * (scale + (1 - scale) * draws[..., :_TRIES])
    aspect = np.exp(np.log(ratio) * (2 * draws[..., _TRIES : 2 * _TRIES] - 1))
    heights, widths = np.rint(np.sqrt(area / aspect)), np.rint(np.sqrt(area * aspect))
    fits = (heights >= 1) & (heights <= height) & (widths >= 1) & (widths <= width)
    first = fits.argmax(-1)[..., None]
    shape = np.stack([np.take_along_axis(sides, first, -1)[..., 0] for sides in (heights, widths)], -1)
    place = draws[..., -2:]
    none_fits = ~fits.any(-1)[..., None]
    shape = np.where(none_fits, _largest(height, width, ratio), shape)
    free = np.array([height, width]) - shape
    corner = np.where(none_fits, free // 2, np.floor(place * (free + 1)))
    return rows.own(np.concatenate([corner, shape], -1).astype(np.int64))


def _largest(height: int, width: int, ratio: float) -> tuple[int, int]:
    """Height and width of the largest part of an image whose sides have at most this ratio."""
    return min(height, max(1, round(width * ratio))), min(width, max(1, round(height * ratio)))


def resized_crops(images: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Parts of images resized to one size, as Pillow's ``crop(box).resize(size, BILINEAR)`` does it: the bytes are the
    same along one axis, and over both within one grey level, since Pillow may begin with the other one.

    All is integer arithmetic but the weights, which are computed alike everywhere: a GPU gives the same bytes, and so
    does any number of rows.

    Parameters
    ----------
    images : uint8 (rows, C, H, W)
    boxes : int64 (rows, 4) on their device: top, left, height, width, within the images

    Returns
    -------
    uint8 (rows, C, *size)
    """
    (height, width), stored = size, images.shape[2:]
    out = images.new_empty((*images.shape[:2], height, width))
    together = max(1, _TOGETHER.get(images.device.type, _TOGETHER_ON_GPU) // images.shape[1:].numel())
    for start in range(0, len(images), together):
        top, left, box_height, box_width = boxes[start : start + together].unbind(1)
        columns = images[start : start + together].permute(0, 3, 1, 2)
        columns = _resized(columns, bilinear_taps_of(left, box_width, width, most=stored[1]))
        lines = columns.permute(0, 3, 2, 1)
        lines = _resized(lines, bilinear_taps_of(top, box_height, height, most=stored[0]))
        out[start : start + together] = lines.permute(0, 2, 1, 3)
    return out


def _resized(images: torch.Tensor, taps: Taps) -> torch.Tensor:
    """Each image resized along its first axis, rounded: uint8 (rows, length, ...) -> uint8 (rows, out, ...).

    What is one place on that axis lies together in memory, and is copied as a whole.
    """
    rows, length, *rest = images.shape
    lines = images.reshape(rows * length, -1)
    first = torch.arange(rows, device=images.device)[:, None] * length
    weights = (taps.weights * 2**_BITS + 0.5).int()
    total: torch.Tensor | None = None
    for tap in range(taps.indices.shape[-1]):
        index, weight = (taps.indices[..., tap] + first).view(-1), weights[..., tap].view(-1, 1)
        part = lines.index_select(0, index) * weight
        total = part if total is None else total.add_(part)
    assert total is not None
    return (total.add_(1 << (_BITS - 1)) >> _BITS).clamp_(0, 255).to(torch.uint8).view(rows, -1, *rest)
