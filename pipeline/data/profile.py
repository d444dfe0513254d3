"""What a set of images and a network's answers to them look like in figures that can be added up."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

import numpy as np

from pipeline.config.frozen import FrozenModel

# Bins of the mean (0 to 255) and the standard deviation (0 to 127.5) of an image's pixel values, and of the largest
# probability (0 to 1): fine enough to find the deciles of any of them.
BRIGHTNESS_BINS, CONTRAST_BINS, CONFIDENCE_BINS = 256, 256, 200
# Upper bounds, in pixels, of the shorter side of a file's image, before it is made to fit.
SIDES = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
LARGER = f"more than {SIDES[-1]}"


class Profile(FrozenModel):
    """Figures of a set of images; those of two sets are added by `merged`.

    images : how many there are
    pixels : of a channel, in all of them
    channel_sums : per channel the sum of pixel values (0 to 255), and of their squares; exact
    brightness, contrast : images by the mean and by the standard deviation of their pixel values, all channels together
    shorter_sides : images of files by the shorter side that the file has, in bins named after their upper bound
    classes : images by the class of the largest probability
    confidence : images by that probability
    confidence_sum : of that probability over all images
    """

    images: int
    pixels: int
    channel_sums: tuple[tuple[int, ...], tuple[int, ...]]
    brightness: tuple[int, ...]
    contrast: tuple[int, ...]
    shorter_sides: dict[str, int]
    classes: tuple[int, ...]
    confidence: tuple[int, ...]
    confidence_sum: float

    @property
    def channel_means(self) -> tuple[float, ...]:
        """Per channel, of pixel values scaled to [0, 1]; NaN without images."""
        pixels = self.pixels or np.nan
        return tuple(total / pixels / 255 for total in self.channel_sums[0])

    @property
    def channel_stds(self) -> tuple[float, ...]:
        """Per channel, of pixel values scaled to [0, 1]; NaN without images."""
        pixels = self.pixels or np.nan
        variances = [s / pixels - (t / pixels) ** 2 for t, s in zip(*self.channel_sums, strict=True)]
        return tuple(float(np.sqrt(np.maximum(variance, 0))) / 255 for variance in variances)


def profile_of_images(images: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of uint8 images (N, C, H, W): ``pixels`` of a channel (), ``channel_sums`` int64 (2, C),
    ``brightness`` and ``contrast``."""
    flat = images.reshape(len(images), math.prod(images.shape[1:]))
    means = flat.mean(axis=1, dtype=np.float64)
    squares = np.einsum("np,np->n", flat, flat, dtype=np.float64, casting="unsafe") / flat.shape[1]
    deviations = np.sqrt(np.maximum(squares - means**2, 0))
    return {
        "pixels": np.array(images[:, 0].size),
        "channel_sums": channel_sums(images),
        "brightness": _histogram(means / 255, BRIGHTNESS_BINS),
        "contrast": _histogram(deviations / 127.5, CONTRAST_BINS),
    }


def channel_sums(pixels: np.ndarray) -> np.ndarray:
    """Sum the values of each channel, and their squares: uint8 (rows, C, H, W) -> int64 (2, C), exact."""
    counts, values = _histograms(pixels), np.arange(256, dtype=np.int64)
    return np.array([counts @ values, counts @ values**2])


def profile_of_answers(probabilities: np.ndarray) -> dict[str, np.ndarray]:
    """The figures of float32 probabilities (N, classes): ``classes``, ``confidence`` and ``confidence_sum`` ()."""
    largest = probabilities.max(axis=1)
    return {
        "classes": np.bincount(probabilities.argmax(axis=1), minlength=probabilities.shape[1]),
        "confidence": _histogram(largest, CONFIDENCE_BINS),
        "confidence_sum": largest.sum(dtype=np.float64),
    }


def side_bin(width: int, height: int) -> str:
    """The bin of an image of this size in `Profile.shorter_sides`."""
    shorter = min(width, height)
    return next((f"up to {side}" for side in SIDES if shorter <= side), LARGER)


def merged(profiles: Iterable[Profile]) -> Profile:
    """The profile of all images of some sets, at least one, that no two of them share."""
    profiles = list(profiles)
    sides: Counter[str] = Counter()
    for profile in profiles:
        sides.update(profile.shorter_sides)

    def total(name: str) -> np.ndarray:
        return np.sum([getattr(profile, name) for profile in profiles], axis=0)

    names = [*(f"up to {side}" for side in SIDES), LARGER]
    sums = total("channel_sums").tolist()
    return Profile(
        images=int(total("images")),
        pixels=int(total("pixels")),
        channel_sums=(tuple(sums[0]), tuple(sums[1])),
        brightness=tuple(total("brightness").tolist()),
        contrast=tuple(total("contrast").tolist()),
        shorter_sides={name: sides[name] for name in names if sides[name]},
        classes=tuple(total("classes").tolist()),
        confidence=tuple(total("confidence").tolist()),
        confidence_sum=float(total("confidence_sum")),
    )


def _histogram(shares: np.ndarray, bins: int) -> np.ndarray:
    """Counts of values from 0 to 1 in bins of one width; 1 is in the last."""
    return np.bincount(np.minimum((shares * bins).astype(np.int64), bins - 1), minlength=bins)


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """How often each channel has each value: int64 (C, 256). Pillow counts three times as fast as numpy."""
    from PIL import Image

    rows, channels, height, width = pixels.shape
    counts = np.zeros((channels, 256), np.int64)
    for channel in range(channels if pixels.size else 0):
        plane = np.ascontiguousarray(pixels[:, channel])
        counts[channel] = Image.frombuffer("L", (width, rows * height), plane, "raw", "L", 0, 1).histogram()
    return counts
