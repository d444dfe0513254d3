"""Seeds until a difference is certain: when to stop, and the interval to report then.

A test that is repeated after each seed finds a difference where there is none more often than its level says. Pocock
(1977), Group sequential methods in the design and analysis of clinical trials, keeps the error rate of all looks
together by one stricter level for each of them. The intervals of that level are the repeated confidence intervals of
Jennison & Turnbull (1989), Interim analyses: the repeated confidence interval approach: they hold at whatever look one
stops, and for whatever reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Literal

import numpy as np
from scipy.special import stdtr

from pipeline.config.study import FIRST_LOOK
from pipeline.report.intervals import LEVEL, Interval, Numbers, Spread, level_at, quantiles

# The interval that is reported after an early stop; see `decide`.
STOPPED_LEVEL = 0.04
_PATHS, _SEED = 40_000, 1977
_FEW_PATHS = 1e-3


@dataclass(frozen=True)
class Decision:
    """What the differences of the seeds so far decide.

    state : ``continue`` with one more seed; ``clear``, the interval excludes zero; ``equivalent``, it lies within the
        smallest difference of interest; ``exhausted``, the maximum of seeds decided nothing
    interval : of the difference, to be reported once it is not ``continue``; None before the first look
    """

    state: Literal["continue", "clear", "equivalent", "exhausted"]
    interval: Interval | None


def decide(spread: Spread, *, max_seeds: int, smallest_difference: float) -> Decision:
    """Whether the seeds so far are enough.

    Looks are after 3, 4, ... ``max_seeds`` seeds, each with the repeated interval (`repeated_half_width`).

    After an early stop the repeated interval is wider than it needs to be, since it would hold at all other looks too.
    Reported is then the headline interval (`Spread.half_width`) of 96%, but never more than the repeated one, so that
    it agrees with the decision. Its confidence was chosen by simulation: over true differences from none to thirty
    deviations of a seed, and images from no to three times the variance of a seed, with at most 5 or 10 seeds, it
    covers 93.3% to 97.0%, on average 96%. An unchanged 95% would cover as little as 92.6%.

    Parameters
    ----------
    spread : of the seeds so far
    max_seeds : of the study, at least 3
    smallest_difference : of interest, as a share: 0.005 is half a point

    Raises
    ------
    ValueError
        ``max_seeds`` is less than 3, or less than the seeds so far.
    """
    if max_seeds < max(FIRST_LOOK, spread.n):
        raise ValueError(
            f"compare.max_seeds={max_seeds}: the first look is after {FIRST_LOOK} seeds, and {spread.n} are done"
        )
    if spread.n < FIRST_LOOK:
        return Decision("continue", None)
    seeds, images = spread.seeds or 0.0, spread.images or 0.0
    half = float(repeated_half_width(seeds, images, spread.n, max_seeds))
    state: Literal["continue", "clear", "equivalent", "exhausted"] = "continue"
    if abs(spread.mean) + half < smallest_difference:
        state = "equivalent"
    elif abs(spread.mean) > half:
        state = "clear"
    elif spread.n == max_seeds:
        state = "exhausted"
    if state in ("clear", "equivalent"):
        half = min(half, spread.half_width(STOPPED_LEVEL) or 0.0)
    return Decision(state, Interval(spread.mean - half, spread.mean + half))


def p_value_of(spread: Spread, max_seeds: int | None) -> float | None:
    """`repeated_p_value` where seeds are added until a difference is certain and it was looked at, else that of the one
    look; None where there is no interval.

    Parameters
    ----------
    max_seeds : None where the number of seeds was fixed
    """
    if max_seeds is None or spread.n < FIRST_LOOK:
        return spread.p_value()
    return repeated_p_value(spread, max_seeds)


def repeated_p_value(spread: Spread, max_seeds: int) -> float:
    """Two-sided and corrected for the looks: the level at which the repeated interval just touches zero.

    Parameters
    ----------
    spread : of at least 3 seeds
    max_seeds : of the study
    """

    def half(level: float) -> float:
        return float(repeated_half_width(spread.seeds or 0.0, spread.images or 0.0, spread.n, max_seeds, level))

    return level_at(half, abs(spread.mean))


def repeated_half_width(seeds: Numbers, images: Numbers, n: int, max_seeds: int, level: float = LEVEL) -> Numbers:
    """Half of the repeated confidence interval of one look: the square root of t^2 s2 + z^2 v.

    The variance s2 over seeds is estimated anew at every look: t is Student's quantile at the level of a look. The
    variance v over images is drawn once for all looks, which share them: z is the normal quantile at the level of all.
    A sum of squares is a little wide for a single look (`half_width`); over several, with no correction for the looks
    in the images' part, all looks together have between 3.3% and 5.6% in the place of 5% (simulated as in `decide`).

    Parameters
    ----------
    seeds, images : standard errors, at least 0: numbers, or arrays of one shape
    n : seeds so far
    max_seeds : of the study
    level : two-sided, of all looks
    """
    t, _ = quantiles(n, look_level(level, max_seeds))
    _, z = quantiles(n, level)
    return np.hypot(t * seeds, z * images)


@lru_cache(maxsize=1024)
def look_level(level: float, max_seeds: int) -> float:
    """The level of each look at which all looks together have the level ``level``, where nothing differs.

    Parameters
    ----------
    level : two-sided, from 0 to 1
    max_seeds : looks are after 3, 4, ... of them
    """
    smallest = _smallest_p_values(max_seeds)
    if level < _FEW_PATHS:  # beyond what the simulation resolves: the share of its smallest levels
        return level * _quantile(smallest, _FEW_PATHS) / _FEW_PATHS
    return _quantile(smallest, level)


def _quantile(ascending: np.ndarray, share: float) -> float:
    """As `numpy.quantile`, which would sort again at each of the thousands of calls that one p-value takes."""
    below = min(int(place := share * (len(ascending) - 1)), len(ascending) - 2)
    return float(ascending[below] + (place - below) * (ascending[below + 1] - ascending[below]))


@cache
def _smallest_p_values(max_seeds: int) -> np.ndarray:
    """The smallest two-sided p-value of Student's test over the looks of each of many studies without a difference.

    Simulated once with a fixed seed: with two degrees of freedom at the first look, tables for normal data do not fit.

    Returns
    -------
    (40,000,) float64, ascending
    """
    differences = np.random.default_rng(_SEED).standard_normal((_PATHS, max_seeds))
    smallest = np.ones(_PATHS)
    for n in range(FIRST_LOOK, max_seeds + 1):
        t = np.sqrt(n) * differences[:, :n].mean(axis=1) / differences[:, :n].std(axis=1, ddof=1)
        smallest = np.minimum(smallest, 2 * stdtr(n - 1, -np.abs(t)))
    return np.sort(smallest)
