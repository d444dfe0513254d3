"""How far images, and a network's answers to them, have moved from those of a reference: statistics of two profiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from pipeline.config.frozen import FrozenModel
from pipeline.data.profile import Profile

# Bins of the reference with about equally many images each, as the index is used in practice (Siddiqi 2006).
BINS = 10
# The usual reading of the population stability index: below the first it has not moved, above the second it has much.
SLIGHT, LARGE = 0.1, 0.25
# Added to every count: a bin without images would make the index infinite (the estimate of Krichevsky & Trofimov 1981).
_PRIOR = 0.5
_CHANCE = 0.95


class DriftFigure(FrozenModel):
    """One property of images or answers, compared with a reference.

    name : "brightness", "contrast", "predicted classes" or "confidence"
    reference : the split that it is compared with
    reference_images, images : how many of each
    psi : population stability index, from 0
    psi_by_chance : that it stays below with 95% probability if nothing has moved
    js_distance : Jensen-Shannon distance, from 0 (the same) to 1 (nothing in common)
    state : "as before", "moved slightly", "moved" or "moved far"
    bins : what each bin is
    reference_shares, shares : of the images in each bin
    """

    name: str
    reference: str
    reference_images: int
    images: int
    psi: float
    psi_by_chance: float
    js_distance: float
    state: str
    bins: tuple[str, ...]
    reference_shares: tuple[float, ...]
    shares: tuple[float, ...]


class ChannelDrift(FrozenModel):
    """The pixels of one channel, scaled to [0, 1], here and in the reference.

    shift : difference of the means in standard deviations of the reference's pixels (Glass 1976, delta)
    """

    channel: int
    mean: float
    std: float
    reference_mean: float
    reference_std: float
    shift: float


class Drift(FrozenModel):
    """All that was compared."""

    figures: tuple[DriftFigure, ...]
    channels: tuple[ChannelDrift, ...]


def drift_of(
    scored: Profile, *, images: Profile, images_of: str, answers: Profile, answers_of: str, classes: Sequence[str]
) -> Drift:
    """Compare what was scored with a reference.

    Parameters
    ----------
    scored : of at least one image
    images, images_of : the reference of inputs, and the name of its split
    answers, answers_of : that of predictions
    classes : their names
    """
    figures = [
        _binned("brightness", images_of, images.brightness, scored.brightness, 255),
        _binned("contrast", images_of, images.contrast, scored.contrast, 127.5),
        _compared("predicted classes", answers_of, answers.classes, scored.classes, classes),
        _binned("confidence", answers_of, answers.confidence, scored.confidence, 1),
    ]
    means = zip(scored.channel_means, scored.channel_stds, images.channel_means, images.channel_stds, strict=True)
    channels = [
        ChannelDrift(
            channel=number,
            mean=mean,
            std=std,
            reference_mean=before,
            reference_std=spread,
            shift=(mean - before) / spread if spread else math.copysign(math.inf, mean - before) * (mean != before),
        )
        for number, (mean, std, before, spread) in enumerate(means)
    ]
    return Drift(figures=tuple(figures), channels=tuple(channels))


def stability_index(reference: Sequence[int], counts: Sequence[int]) -> float:
    """The population stability index, sum over bins of (p - q) ln(p / q), with p and q the shares of the two
    (Siddiqi 2006, "Credit Risk Scorecards"); the symmetric divergence of Jeffreys (1946).

    Parameters
    ----------
    reference, counts : images in each bin; half an image is added to each
    """
    q, p = _shares(reference), _shares(counts)
    return float(np.sum((p - q) * np.log(p / q)))


def index_by_chance(reference_images: int, images: int, bins: int) -> float:
    """What the index of two samples of one population stays below with 95% probability: (1/n + 1/m) times the quantile
    of chi-squared with one degree of freedom less than bins (Yurdakul & Naranjo 2020, "Statistical properties of the
    population stability index", Journal of Risk Model Validation 14)."""
    from scipy.stats import chi2

    if bins < 2:
        return 0.0
    return float((1 / reference_images + 1 / images) * chi2.ppf(_CHANCE, bins - 1))


def js_distance(reference: Sequence[int], counts: Sequence[int]) -> float:
    """The square root of the Jensen-Shannon divergence in bits (Lin 1991; a metric by Endres & Schindelin 2003)."""
    q, p = (np.array(values, float) / max(1, sum(values)) for values in (reference, counts))
    middle = (p + q) / 2

    def divergence(shares: np.ndarray) -> float:
        some = shares > 0
        return float(np.sum(shares[some] * np.log2(shares[some] / middle[some])))

    return math.sqrt(max(0.0, (divergence(p) + divergence(q)) / 2))


def state_of(index: float, by_chance: float) -> str:
    """An index in words."""
    if index <= by_chance:
        return "as before"
    return "moved slightly" if index < SLIGHT else "moved" if index < LARGE else "moved far"


def _binned(name: str, split: str, reference: Sequence[int], counts: Sequence[int], largest: float) -> DriftFigure:
    """Compare two fine histograms in bins that each have about a tenth of the reference."""
    edges = _quantile_edges(reference)
    width = largest / len(reference)
    bounds = [0, *edges, len(reference)]
    bins = [f"{start * width:.3g} to {end * width:.3g}" for start, end in itertools.pairwise(bounds)]
    starts = bounds[:-1]
    before, now = (np.add.reduceat(np.array(values), starts).tolist() for values in (reference, counts))
    return _compared(name, split, before, now, bins)


def _quantile_edges(counts: Sequence[int]) -> list[int]:
    """Where to cut fine bins so that each part has about a tenth of the counts: numbers of bins, growing."""
    so_far = np.cumsum(counts) / max(1, sum(counts))
    cuts = {int(np.searchsorted(so_far, share, side="left")) + 1 for share in np.arange(1, BINS) / BINS}
    return sorted(cut for cut in cuts if cut < len(counts))


def _compared(
    name: str, split: str, reference: Sequence[int], counts: Sequence[int], bins: Sequence[str]
) -> DriftFigure:
    before, now = sum(reference), sum(counts)
    index, by_chance = stability_index(reference, counts), index_by_chance(before, now, len(bins))
    return DriftFigure(
        name=name,
        reference=split,
        reference_images=before,
        images=now,
        psi=index,
        psi_by_chance=by_chance,
        js_distance=js_distance(reference, counts),
        state=state_of(index, by_chance),
        bins=tuple(bins),
        reference_shares=tuple(count / before for count in reference),
        shares=tuple(count / now for count in counts),
    )


def _shares(counts: Sequence[int]) -> np.ndarray:
    raised = np.array(counts, float) + _PRIOR
    return raised / raised.sum()
