"""Seeded, label-preserving deformed copies of images: shift, rotation, scale, elastic. Pure numpy.

The elastic field is that of Simard, Steinkraus & Platt (2003, "Best practices for convolutional neural networks",
section 2): random displacements smoothed by a Gaussian; like them, the "infinite MNIST" sets of Loosli, Canu & Bottou
(2007) add it to affine changes. Here the random displacements sit on a coarse grid, which a smooth field does not tell
apart, and smoothing is two small matrix products.

What a copy looks like depends on (seed, id, copy) alone: neither on the machine nor on the rows it is made with. So
what processors round differently (sines, matrix products) is calculated in float64 and rounded to float32.
"""

from __future__ import annotations

import numpy as np

from pipeline.config.dataset import DeformSettings

# Grid of random displacements, each way; and the deviation of the Gaussian in grid cells.
_GRID = 6
_SMOOTHNESS = 0.8
_AFFINE_NUMBERS = 5


def deform(
    images: np.ndarray, ids: np.ndarray, copies: np.ndarray, *, seed: int, settings: DeformSettings
) -> np.ndarray:
    """Deformed copies, resampled bilinearly; pixels from outside an image repeat its edge.

    Parameters
    ----------
    images : uint8 (rows, C, H, W)
    ids, copies : int64 (rows,)

    Returns
    -------
    uint8 (rows, C, H, W)
    """
    rows, _, height, width = images.shape
    numbers = uniform(ids, copies, seed=seed, count=_AFFINE_NUMBERS + 2 * _GRID * _GRID)
    y, x = _affine(numbers[:, :_AFFINE_NUMBERS], height, width, settings)
    if settings.elastic:
        noise = numbers[:, _AFFINE_NUMBERS:].reshape(rows, 2, _GRID, _GRID)
        # A uniform number between -1 and 1 has the deviation 1 / sqrt(3).
        field = (settings.elastic * 3**0.5 * (_smoother(height) @ noise @ _smoother(width).T)).astype(np.float32)
        y += field[:, 0]
        x += field[:, 1]
    return _sample(images, y, x)


def uniform(ids: np.ndarray, copies: np.ndarray, *, seed: int, count: int) -> np.ndarray:
    """``count`` numbers from -1 to 1 for each row: float32 (rows, count), by SplitMix64 (Steele, Lea & Flood 2014)."""
    step = np.uint64(0x9E3779B97F4A7C15)
    start = _mix(ids.astype(np.uint64) + np.uint64(seed * int(step) % 2**64))
    start = _mix(start ^ (copies.astype(np.uint64) * step))
    words = _mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * step)
    return (words >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)


def _mix(words: np.ndarray) -> np.ndarray:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def _affine(numbers: np.ndarray, height: int, width: int, settings: DeformSettings) -> tuple[np.ndarray, np.ndarray]:
    """Where in the original each pixel comes from: y and x, float32 (rows, H, W)."""
    shift = settings.shift * numbers[:, :2, None, None]
    angle = np.deg2rad(settings.rotation) * numbers[:, 2, None, None].astype(np.float64)
    scale = 1 + settings.scale * numbers[:, 3:5, None, None]
    y, x = np.meshgrid(
        np.arange(height, dtype=np.float32) - (height - 1) / 2,
        np.arange(width, dtype=np.float32) - (width - 1) / 2,
        indexing="ij",
    )
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    return (
        (cos * y - sin * x) / scale[:, 0] + shift[:, 0] + np.float32((height - 1) / 2),
        (sin * y + cos * x) / scale[:, 1] + shift[:, 1] + np.float32((width - 1) / 2),
    )


def _smoother(pixels: int) -> np.ndarray:
    """Float64 (pixels, grid): Gaussian weights of the grid's numbers, scaled so that deviations stay as they are."""
    places = (np.arange(pixels) + 0.5) / pixels * _GRID - 0.5
    weights = np.exp(-0.5 * ((places[:, None] - np.arange(_GRID)) / _SMOOTHNESS) ** 2)
    return weights / np.sqrt((weights**2).sum(axis=1, keepdims=True))


def _sample(images: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Bilinear values at (y, x), rounded."""
    rows, channels, height, width = images.shape
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    top = np.minimum(y.astype(np.int32), max(0, height - 2))
    left = np.minimum(x.astype(np.int32), max(0, width - 2))
    down, right = (y - top)[:, None], (x - left)[:, None]
    starts = np.arange(rows * channels, dtype=np.int32).reshape(rows, channels, 1) * (height * width)
    place = starts + (top * width + left).reshape(rows, 1, height * width)
    below, beside = (width if height > 1 else 0), (1 if width > 1 else 0)
    flat = images.reshape(-1)
    corner = [flat[place + step].reshape(rows, channels, height, width) for step in (0, beside, below, below + beside)]
    upper = corner[0] + right * (corner[1].astype(np.float32) - corner[0])
    lower = corner[2] + right * (corner[3].astype(np.float32) - corner[2])
    return (upper + down * (lower - upper) + np.float32(0.5)).astype(np.uint8)
