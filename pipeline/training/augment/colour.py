"""Colours changed at random: brightness, contrast and saturation, as Pillow's ImageEnhance changes them."""

from __future__ import annotations

import torch

from pipeline.config.augment import AugmentSettings
from pipeline.training.augment.draws import BatchRows, Purpose, array_on_device

# Shares of red, green and blue in grey, of 65,536: ITU-R 601-2, as Pillow converts to "L".
_GREY = (19595, 38470, 7471)


def jitter(images: torch.Tensor, settings: AugmentSettings, rows: BatchRows) -> torch.Tensor:
    """Images whose brightness, contrast and saturation are multiplied by a factor each.

    The factors of an image are uniform in [1 - x, 1 + x] of their settings. Their order is drawn for each step
    (Krizhevsky et al. 2012 and those after them changed colours in one form or another; these three are Howard 2013's).

    Parameters
    ----------
    images : uint8 (rows, C, H, W); of one channel they have no saturation

    Returns
    -------
    uint8 (rows, C, H, W)
    """
    most = (settings.brightness, settings.contrast, settings.saturation)
    draws = rows.own(rows.generator(Purpose.COLOUR).random(rows.shape(len(most)), dtype="float32"))
    factors = array_on_device(1 + (2 * draws - 1) * torch.tensor(most).numpy(), images.device)
    for number in rows.generator(Purpose.COLOUR_ORDER).permutation(len(most)).tolist():
        if most[number]:
            images = _away_from(_CENTRES[number](images), images, factors[:, number])
    return images


def _black(images: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), device=images.device)


def _mean_grey(images: torch.Tensor) -> torch.Tensor:
    """The mean of each image's grey values, rounded: float32 (rows, 1, 1, 1). Sums of integers are exact."""
    grey = _grey(images)
    count = grey[0].numel()
    mean = (grey.sum((1, 2, 3), dtype=torch.int64) * 2 + count).div(2 * count, rounding_mode="floor")
    return mean.float().view(-1, 1, 1, 1)


def _grey(images: torch.Tensor) -> torch.Tensor:
    """int32 (rows, 1, H, W)"""
    if images.shape[1] == 1:
        return images.int()
    weighted = [images[:, channel : channel + 1].int() * share for channel, share in enumerate(_GREY)]
    return (weighted[0] + weighted[1] + weighted[2] + 0x8000) >> 16


def _away_from(centre: torch.Tensor, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """``centre + factor * (images - centre)``, rounded and bounded. Each operation is rounded by itself, everywhere."""
    distance = (images.float() - centre) * factor.view(-1, 1, 1, 1)
    return (distance + centre).round().clamp(0, 255).to(torch.uint8)


# What each of the three moves away from, in the order of their settings.
_CENTRES = (_black, _mean_grey, lambda images: _grey(images).float())
