"""Images mixed with one another, and their labels with them: mixup and cutmix."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.config.augment import AugmentSettings
from pipeline.training.augment.draws import BatchRows, Purpose, array_on_device
from pipeline.training.augment.placement import inside


def mix(
    images: torch.Tensor, labels: torch.Tensor, settings: AugmentSettings, rows: BatchRows, *, classes: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each image mixed with another of its own lane, which the same rank has, whatever the number of ranks.

    With lambda drawn of Beta(alpha, alpha) for each image, and the other image a random permutation's:

    - mixup (Zhang et al. 2018, equation 1): ``lambda * image + (1 - lambda) * other``
    - cutmix (Yun et al. 2019, equations 1 and 2): a rectangle with the sides ``sqrt(1 - lambda)`` of the image's, at a
      uniformly drawn centre and cut off at the borders, is the other's; lambda is then the share that is left

    The label is ``lambda * label + (1 - lambda) * other's``. With both, half of the images get each.

    Parameters
    ----------
    images : uint8 (rows, C, H, W), one rank's part of a global batch, lane after lane
    labels : int64 (rows,)
    classes : their number

    Returns
    -------
    images : uint8 (rows, C, H, W)
    labels : float32 (rows, classes), the share of each class in an image; each row sums to 1
    """
    device, (height, width) = images.device, images.shape[2:]
    cut, share = _draw_shares(settings, rows)
    first, end = _draw_rectangles(rows, np.where(cut, share, 1.0), height, width)
    left = 1 - np.prod(end - first, axis=1) / (height * width)
    lambdas = np.where(cut, left, share).astype(np.float32)
    others = array_on_device(_draw_others(rows), device)
    of_others = images.index_select(0, others)
    if not cut.all():
        kept = array_on_device(np.where(cut, np.float32(1), lambdas), device).view(-1, 1, 1, 1)
        mixed = (images * kept + of_others * (1 - kept)).round().to(torch.uint8)
    else:
        mixed = images
    if cut.any():
        rectangles = inside(array_on_device(first, device), array_on_device(end, device), height, width)
        mixed = torch.where(rectangles, of_others, mixed)
    known = (labels[:, None] == torch.arange(classes, device=device)).float()
    weight = array_on_device(lambdas, device)[:, None]
    return mixed, known * weight + known.index_select(0, others) * (1 - weight)


def _draw_shares(settings: AugmentSettings, rows: BatchRows) -> tuple[np.ndarray, np.ndarray]:
    """Of each image whether it is cut, and lambda, which is 1 where it is not mixed at all: (rows,) each."""
    kinds = rows.generator(Purpose.MIX_KIND).random(rows.shape(2))
    cut = np.full(rows.shape(), bool(settings.cutmix))
    if settings.mixup and settings.cutmix:
        cut = kinds[..., 0] < 0.5
    alphas = np.where(cut, settings.cutmix, settings.mixup)
    share = rows.generator(Purpose.MIX_SHARE).beta(alphas, alphas)
    return rows.own(cut), rows.own(np.where(kinds[..., 1] < settings.mix_probability, share, 1.0))


def _draw_rectangles(rows: BatchRows, share: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """The first pixel of each image's rectangle, and that after the last, within the image: int64 (rows, 2) each."""
    sides = np.array([height, width])
    centre = rows.own(rows.generator(Purpose.MIX_PLACE).integers(0, sides, rows.shape(2)))
    half = (np.sqrt(1 - share)[:, None] * sides).astype(np.int64)
    return np.clip(centre - half // 2, 0, sides), np.clip(centre - half // 2 + half, 0, sides)


def _draw_others(rows: BatchRows) -> np.ndarray:
    """The row that each row is mixed with: int64 (rows,), a random permutation of every lane."""
    within = rows.own(rows.generator(Purpose.MIX_WITH).random(rows.shape()).argsort(axis=1, kind="stable"))
    return within + np.repeat(np.arange(len(rows.lanes)), rows.lane_rows) * rows.lane_rows
