"""How certain a difference between two arms is: over seeds, over test images, and over both together.

A comparison draws at random twice: the seeds that networks are trained with, and the images they are evaluated on. Let
d[s, i] be the score of the arm on image i minus that of the baseline, both trained with seed s, as a model with crossed
random effects:

    d[s, i] = mu + a[s] + b[i] + e[s, i]

a is what a seed does to all images, b what an image does to all seeds, e the rest. With n seeds and N images the mean
over both varies by

    var(a) / n + var(b) / N + var(e) / (n N)

The differences of single seeds, D[s] = mean over i of d[s, i], vary over seeds by var(a) + var(e) / N, so that their
sample variance over n holds the first and the last term. What is missing is var(b) / N: what all seeds share because
they are evaluated on the same images. It is the covariance, over images, of the mean differences of two seeds.

Few images may agree by chance: three seeds that each have one image of thirty more right than the baseline differ by
nothing at all. So the images' part is that of one image more (`unseen_variance`) than was seen to differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

Numbers = float | np.ndarray
Covered = Literal["seeds and images", "seeds", "images", "nothing"]
# Two-sided level of a single interval: one minus its confidence.
LEVEL = 0.05
_MOST_SEEDS = 1_000
_SMALLEST_LEVEL = 1e-100


class Interval(NamedTuple):
    """Its lower and its upper end."""

    low: float
    high: float


def quantiles(n: int, level: float) -> tuple[float, float]:
    """Two-sided quantiles of Student's t with n - 1 degrees of freedom, and of the normal distribution."""
    return -float(stdtrit(n - 1, level / 2)), -float(ndtri(level / 2))


def half_width(seeds: Numbers, images: Numbers, n: int, level: float = LEVEL) -> Numbers:
    """Half of an interval that covers seeds and images.

    With the variances s2 over seeds and v over images, Student's quantile t of n - 1 degrees of freedom, and the normal
    quantile z, it is the square root of

        (s2 + v) (z^2 + (t^2 - z^2) (s2 / (s2 + v))^2)

    but no less than the half of either part alone, t s or z sqrt(v). The seeds' variance is estimated from few seeds,
    the images' from thousands of images: the quantile of such a sum lies between z and t, and by Welch (1947), The
    generalization of "Student's" problem when several different population variances are involved, its square is, to
    first order in 1 / (n - 1), z^2 plus (t^2 - z^2) times the square of the seeds' share. Both ends are exact. Between
    them a nominal 95% covers 94.6% to 95.8%, whatever the share, for three seeds and more (by quadrature, in
    `tests/report/test_intervals.py`). Satterthwaite's (1946) degrees of freedom cover as little as 92.2% with three
    seeds, and adding the squares of the two halves as much as 97.7%.

    Parameters
    ----------
    seeds, images : standard errors, at least 0: numbers, or arrays of one shape
    n : seeds, at least 2
    level : two-sided
    """
    t, z = quantiles(n, level)
    variance = np.square(seeds) + np.square(images)
    share = np.square(seeds) / np.where(variance > 0, variance, 1)
    both = np.sqrt(variance * (z**2 + (t**2 - z**2) * np.square(share)))
    return np.maximum(both, np.maximum(t * seeds, z * images))


@dataclass(frozen=True)
class Spread:
    """A mean difference, and how far it would vary with other seeds and with other images.

    mean : over seeds and images, arm minus baseline
    n : seeds
    seeds : standard error over seeds, sample deviation of the seeds' differences / sqrt(n); None for a single seed
    images : standard deviation of what all seeds share through their images, sqrt(var(b) / N); of a single seed, its
        standard error over images; None where the predictions are not known
    """

    mean: float
    n: int
    seeds: float | None
    images: float | None

    @property
    def covers(self) -> Covered:
        """What the headline interval covers."""
        if self.seeds is None:
            return "nothing" if self.images is None else "images"
        return "seeds" if self.images is None else "seeds and images"

    def half_width(self, level: float = LEVEL) -> float | None:
        """Half of the headline interval, of `covers`; None where neither spread is known."""
        if self.seeds is None:
            return None if self.images is None else quantiles(2, level)[1] * self.images
        return float(half_width(self.seeds, self.images or 0.0, self.n, level))

    def interval(self, level: float = LEVEL) -> Interval | None:
        """The headline interval; None where neither spread is known."""
        return self._around(self.half_width(level))

    def over_seeds(self, level: float = LEVEL) -> Interval | None:
        """Student's interval over seeds, for these very images."""
        return self._around(None if self.seeds is None else quantiles(self.n, level)[0] * self.seeds)

    def over_images(self, level: float = LEVEL) -> Interval | None:
        """The normal interval over images: what other images would change, were the seeds without number."""
        return self._around(None if self.images is None else quantiles(2, level)[1] * self.images)

    def p_value(self) -> float | None:
        """Two-sided: the level at which the headline interval just touches zero; None where there is no interval."""
        if self.covers == "nothing":
            return None
        return level_at(lambda level: self.half_width(level) or 0.0, abs(self.mean))

    def seeds_needed(self, smallest_difference: float) -> int | None:
        """How many seeds would decide, if mean and spreads stayed as they are; those that there are, if they do.

        Decided is a difference whose interval excludes zero or lies within plus and minus ``smallest_difference``.

        Returns
        -------
        None where no number of up to 1,000 seeds would, since the images' part alone is too wide, or nothing is known
        about the spread over seeds.
        """
        if self.seeds is None:
            return None
        wanted = max(abs(self.mean), smallest_difference - abs(self.mean))
        deviation = self.seeds * np.sqrt(self.n)
        for n in range(self.n, _MOST_SEEDS + 1):
            if half_width(deviation / np.sqrt(n), self.images or 0.0, n) < wanted:
                return n
        return None

    def _around(self, half: float | None) -> Interval | None:
        return None if half is None else Interval(self.mean - half, self.mean + half)


def spread_of(by_seed: np.ndarray, covariance: np.ndarray | None = None, unseen: float = 0.0) -> Spread:
    """The mean difference and its spread.

    Parameters
    ----------
    by_seed : (n,) float64, difference of each seed, arm minus baseline
    covariance : (n, n) float64, covariance of these differences over images, as `image_covariance` gives it; None where
        the predictions are not known
    unseen : variance that is added for what so few images may not have shown, as `unseen_variance` gives it
    """
    n = len(by_seed)
    seeds = float(by_seed.std(ddof=1) / np.sqrt(n)) if n > 1 else None
    mean = float(by_seed.mean())
    if covariance is None:
        return Spread(mean, n, seeds, None)
    shared = (covariance.sum() - np.trace(covariance)) / (n * (n - 1)) if n > 1 else covariance[0, 0]
    # An estimate of a variance near zero may be negative.
    return Spread(mean, n, seeds, float(np.sqrt(max(shared, 0) + unseen)))


def unseen_variance(labels: np.ndarray, *, by_class: bool) -> float:
    """Variance, over images, of a mean of hits and misses, of which one image more differs than was seen.

    Agresti & Min (2005), Simple improved confidence intervals for comparing matched proportions, add half an image to
    each of the two ways in which two networks can differ on one: where none was seen to differ, intervals have a width.
    Among 10,000 images it is nothing, among 30 an interval of 6.5 points up and down. Without it, of two equal arms one
    was found better with two seeds and 30 images in up to 10% of simulated studies in the place of 5%; with it in 3%.

    Parameters
    ----------
    labels : (images,) integer
    by_class : for balanced accuracy, which counts each class equally: one image in each
    """
    rows = np.unique(labels, return_counts=True)[1] if by_class else np.array([len(labels)])
    return float(np.sum(1.0 / rows.astype(np.float64) ** 2) / len(rows) ** 2)


def image_covariance(differences: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """Covariance, over images, of the mean differences of all pairs of seeds.

    It is what a bootstrap that draws the same images for all seeds converges to, times rows / (rows - 1) (Efron &
    Tibshirani 1993, An Introduction to the Bootstrap, section 5.3), without drawing.

    Parameters
    ----------
    differences : (seeds, images), score of the arm minus that of the baseline on each image, -1, 0 or 1; the same
        images in the same order for all seeds
    labels : (images,) integer, for balanced accuracy: each class counts equally, images vary within their class. None
        for accuracy: each image counts equally, whatever its class

    Returns
    -------
    (seeds, seeds) float64
    """
    differences = np.asarray(differences, dtype=np.float64)
    if labels is None:
        return _covariance_of_mean(differences)
    classes = np.unique(labels)
    parts = [_covariance_of_mean(differences[:, labels == label]) for label in classes]
    return np.sum(parts, axis=0) / len(classes) ** 2


def _covariance_of_mean(differences: np.ndarray) -> np.ndarray:
    rows = differences.shape[1]
    if rows == 1:  # how it varies cannot be seen: its square is the largest that this image allows
        return differences @ differences.T
    centred = differences - differences.mean(axis=1, keepdims=True)
    return centred @ centred.T / (rows * (rows - 1))


def mean_score(correct: np.ndarray, labels: np.ndarray | None = None) -> np.ndarray:
    """Mean over the images of the last axis; over the classes' means where ``labels`` are given (balanced accuracy)."""
    correct = np.asarray(correct, dtype=np.float64)
    if labels is None:
        return correct.mean(axis=-1)
    return np.mean([correct[..., labels == label].mean(axis=-1) for label in np.unique(labels)], axis=0)


def level_at(half_width: Callable[[float], float], distance: float) -> float:
    """The two-sided level at which a half width is ``distance``, from 0 to 1, by bisection; 0 below 1e-100.

    Parameters
    ----------
    half_width : falls as the level rises
    """
    if not distance:
        return 1.0
    low, high = float(np.log(_SMALLEST_LEVEL)), 0.0  # of the level's logarithm
    if half_width(_SMALLEST_LEVEL) < distance:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if half_width(float(np.exp(middle))) > distance else (low, middle)
    return float(np.exp(high))
