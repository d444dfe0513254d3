"""How far images, and a network's answers to them, have moved from those of a reference: statistics of two profiles."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from statistics import NormalDist

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
# Samples by which chance is told, and how many counts these may be in all.
_DRAWS, _FEWEST_DRAWS, _COUNTS = 2_000, 200, 2_000_000
# What Cohen (1988) calls a small and a medium difference of means, in standard deviations.
SMALL_SHIFT, MEDIUM_SHIFT = 0.2, 0.5


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

    shift : difference of the means in standard deviations of the reference's pixels (Glass 1976, delta); null where
        those are all the same
    shift_by_chance : that its size stays below with at least 95% probability if nothing has moved
    state : "as before", "moved slightly", "moved" or "moved far"
    """

    channel: int
    mean: float
    std: float
    reference_mean: float
    reference_std: float
    shift: float | None
    shift_by_chance: float
    state: str


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
    return Drift(figures=tuple(figures), channels=_channels(images, scored))


def stability_index(reference: Sequence[int], counts: Sequence[int]) -> float:
    """The population stability index, sum over bins of (p - q) ln(p / q), with p and q the shares of the two
    (Siddiqi 2006, "Credit Risk Scorecards"); the symmetric divergence of Jeffreys (1946).

    Parameters
    ----------
    reference, counts : images in each bin; half an image is added to each
    """
    q, p = _shares(reference), _shares(counts)
    return float(np.sum((p - q) * np.log(p / q)))


def index_by_chance(reference: Sequence[int], counts: Sequence[int]) -> float:
    """What the index of two samples of one population stays below with 95% probability, drawn from the shares of both
    together (a parametric bootstrap, Efron & Tibshirani 1993, chapter 16), with the same draws in every call.

    With many images in every bin that is (1/n + 1/m) times the quantile of chi-squared with one degree of freedom less
    than bins (Yurdakul & Naranjo 2020, "Statistical properties of the population stability index", Journal of Risk
    Model Validation 14); with few images or many classes that formula is far off.

    Parameters
    ----------
    reference, counts : images in each bin
    """
    both = np.add(reference, counts, dtype=float)
    random, draws = np.random.default_rng(0), max(_FEWEST_DRAWS, min(_DRAWS, _COUNTS // len(both)))
    samples = (random.multinomial(sum(images), both / both.sum(), size=draws) for images in (reference, counts))
    q, p = (_shares(sample) for sample in samples)
    return float(np.quantile(np.sum((p - q) * np.log(p / q), axis=1), _CHANCE))


def js_distance(reference: Sequence[int], counts: Sequence[int]) -> float:
    """The square root of the Jensen-Shannon divergence in bits (Lin 1991; a metric by Endres & Schindelin 2003)."""
    q, p = (np.array(values, float) / max(1, sum(values)) for values in (reference, counts))
    middle = (p + q) / 2

    def divergence(shares: np.ndarray) -> float:
        some = shares > 0
        return float(np.sum(shares[some] * np.log2(shares[some] / middle[some])))

    return math.sqrt(max(0.0, (divergence(p) + divergence(q)) / 2))


def state_of(size: float, by_chance: float, slight: float = SLIGHT, large: float = LARGE) -> str:
    """The size of a move in words: an index, or with other bounds a shift."""
    if size <= by_chance:
        return "as before"
    return "moved slightly" if size < slight else "moved" if size < large else "moved far"


def _channels(reference: Profile, scored: Profile) -> tuple[ChannelDrift, ...]:
    """By chance the mean over images moves by no more than if each had a mean of its own for all its pixels: then it
    varies as pixels do, and otherwise less."""
    by_chance = NormalDist().inv_cdf((1 + _CHANCE) / 2) * math.sqrt(1 / reference.images + 1 / scored.images)
    means = zip(scored.channel_means, scored.channel_stds, reference.channel_means, reference.channel_stds, strict=True)
    found = []
    for number, (mean, std, before, spread) in enumerate(means):
        shift = (mean - before) / spread if spread else None
        size = abs(shift) if shift is not None else 0.0 if mean == before else math.inf
        found.append(
            ChannelDrift(
                channel=number,
                mean=mean,
                std=std,
                reference_mean=before,
                reference_std=spread,
                shift=shift,
                shift_by_chance=by_chance,
                state=state_of(size, by_chance, SMALL_SHIFT, MEDIUM_SHIFT),
            )
        )
    return tuple(found)


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
    """Where to cut fine bins so that each part has about a tenth of the counts: numbers of bins, growing.

    A fine bin that has a tenth alone is a part of its own: what lies on one side of it must not be counted with it.
    """
    total = max(1, sum(counts))
    so_far = np.cumsum(counts) / total
    cuts = {int(np.searchsorted(so_far, share, side="left")) + 1 for share in np.arange(1, BINS) / BINS}
    heavy = np.flatnonzero(np.array(counts) * BINS >= total).tolist()
    return sorted(cut for cut in cuts.union(heavy, (bin_ + 1 for bin_ in heavy)) if 0 < cut < len(counts))


def _compared(
    name: str, split: str, reference: Sequence[int], counts: Sequence[int], bins: Sequence[str]
) -> DriftFigure:
    before, now = sum(reference), sum(counts)
    index, by_chance = stability_index(reference, counts), index_by_chance(reference, counts)
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


def _shares(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    raised = np.asarray(counts, float) + _PRIOR
    return raised / raised.sum(axis=-1, keepdims=True)
