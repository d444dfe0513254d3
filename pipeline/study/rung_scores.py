"""What candidates of a search have shown at the end of a rung, and which of two is better, over images and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.intervals import Spread, image_covariance, spread_of

# A candidate goes on while its mean cost is at most this share above the best: with many images an early difference is
# soon beyond its uncertainty, and yet too small to last.
CLOSE = 0.05


@dataclass(frozen=True)
class RungScore:
    """What a candidate has shown at the end of a rung.

    costs : float64 (images,), lower is better: the cross-entropy of each validation image in nats, or 1 where it was
        misclassified and 0 where not, times what an image of its class counts. In one order for all candidates
    learned : whether it was better than always naming the largest class (see `pipeline.report.learned.beats_constant`)
    diverged : whether its training has ended with a loss that is not finite; costs are then not looked at
    """

    costs: np.ndarray
    learned: bool
    diverged: bool = False


# Of one seed of a candidate, the score of each rung that it has trained, the shortest first.
Rungs = Sequence[RungScore]


def rung_units(rung: int) -> int:
    """Length of a rung in lengths of the first, which is number 0: as `optimizer.cycle_ends` cuts a training."""
    return 2**rung


def units_of(rungs: int) -> int:
    """Lengths of a first rung that so many rungs of one candidate take."""
    return 2**rungs - 1


def difference(ones: Rungs, others: Rungs) -> Spread:
    """The mean cost of one candidate minus that of another, and how far other seeds and images would move it.

    Parameters
    ----------
    ones, others : a score of each seed, of the same rung; those of seeds that only one of them has are not looked at
    """
    costs = np.array([one.costs - other.costs for one, other in zip(ones, others, strict=False)])
    return spread_of(costs.mean(axis=1), image_covariance(costs))


def is_worse(ones: Rungs, others: Rungs) -> bool:
    """Whether one's mean cost is above the other's, beyond the 95% interval of their paired difference.

    It is over seeds and images, or of a single seed over images alone.
    """
    spread = difference(ones, others)
    half = spread.half_width()
    return half is not None and spread.mean > half


def is_out(ones: Rungs, others: Rungs) -> bool:
    """Whether one need not go on beside the other: it costs more by a share `CLOSE` of the other's cost, and is worse.

    Of a single seed that is `is_worse`. Of several, an interval of 95% over seeds would hardly ever say so: the
    difference exceeds what images alone explain, as for a single seed, and one standard error over images and seeds.
    """
    spread = difference(ones, others)
    cost = np.mean([other.costs.mean() for other, _ in zip(others, ones, strict=False)])
    images = spread.over_images()
    if spread.mean <= CLOSE * cost or images is None:
        return False
    return images.low > 0 and spread.mean > standard_error(spread)


def standard_error(spread: Spread) -> float:
    """Of a mean difference over seeds and images, or of a single seed over images alone."""
    return math.hypot(spread.seeds or 0.0, spread.images or 0.0)


def has_failed(rungs: Rungs, repeats: Sequence[Rungs] = ()) -> bool:
    """Whether a candidate has diverged, or has collapsed: it had learned, and at its last rung has not.

    Parameters
    ----------
    repeats : its rungs with further seeds. One that has not learned where the first seed had has collapsed
    """
    if any(score.diverged for of_seed in (rungs, *repeats) for score in of_seed):
        return True
    if any(score.learned for score in rungs) and not rungs[-1].learned:
        return True
    return any(first.learned and not score.learned for of_seed in repeats for first, score in _pairs(rungs, of_seed))


def _pairs(rungs: Rungs, of_seed: Rungs) -> list[tuple[RungScore, RungScore]]:
    """The first seed's and another's score of the last rung that the other has trained; nothing where it has none."""
    last = min(len(rungs), len(of_seed))
    return [(rungs[last - 1], of_seed[last - 1])] if last else []
