"""Which candidates of an arm train on, and which one is chosen: successive halving by what can be told apart.

Successive halving (Jamieson & Talwalkar 2016, algorithm 1; Li et al. 2018, section 3) trains all candidates for a short
first rung and the better half for a longer one, again and again. Here it is not a half that goes on, but all that
cannot be told from the best or are close to it, so that neither noise nor a head start chooses; the search ends when
one stands out or the budget does not hold another rung. Rung k trains 2^(k-1) times as long as the first. Pure numpy:
no trainings, no Spark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.report.comparison import SearchUndecided

# Half the width of a two-sided 95% interval, in standard errors.
Z = 1.96
# A candidate goes on while its mean cost is at most this share above the best: with many images an early difference is
# soon beyond its uncertainty, and yet too small to last.
CLOSE = 0.05


@dataclass(frozen=True)
class RungScore:
    """What a candidate has shown at the end of a rung.

    costs : float64 (images,), lower is better: the cross-entropy of each validation image in nats, or 1 where it was
        misclassified and 0 where not, times what an image of its class counts. In one order for all candidates
    learned : whether it was better than always naming the largest class (see `has_learned`)
    diverged : whether its training has ended with a loss that is not finite; costs are then not looked at
    """

    costs: np.ndarray
    learned: bool
    diverged: bool = False


@dataclass(frozen=True)
class Budget:
    """What the search of one arm may train, in lengths of a first rung.

    units : in all, by all candidates
    rungs : of one candidate
    """

    units: int
    rungs: int


@dataclass(frozen=True)
class Train:
    """These candidates, by number, train their next rung now."""

    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Extend:
    """This candidate stands out at an edge of the grid: one beyond it is to be tried."""

    beyond: int


@dataclass(frozen=True)
class Choice:
    """The search is over.

    candidate : the one to take, by number
    tied : those that could not be told apart, itself included, by number; it alone where it stands out
    undecided : why the choice is not certain; None where it is
    """

    candidate: int
    tied: tuple[int, ...]
    undecided: SearchUndecided | None = None


def has_learned(labels: np.ndarray, predictions: np.ndarray, weights: np.ndarray) -> bool:
    """Whether predictions are right more often than always naming the largest class, beyond their uncertainty.

    The two are compared image by image: the mean of weight x (right - of the largest class) exceeds 0 by `Z` of its
    standard errors.

    Parameters
    ----------
    labels, predictions : int (images,)
    weights : float (images,), how much each counts, also for which class is the largest
    """
    if not len(labels):
        return False
    largest = np.bincount(labels, weights).argmax()
    return _is_above_zero(weights * ((predictions == labels).astype(np.float64) - (labels == largest)))


def is_worse(one: RungScore, other: RungScore) -> bool:
    """Whether one's mean cost is above the other's by more than `Z` standard errors of their paired difference."""
    return _is_above_zero(one.costs - other.costs)


def is_out(one: RungScore, other: RungScore) -> bool:
    """Whether one need not go on beside the other: it is worse, and by a share `CLOSE` of the other's cost."""
    return is_worse(one, other) and bool(one.costs.mean() > (1 + CLOSE) * other.costs.mean())


def _is_above_zero(values: np.ndarray) -> bool:
    """Whether a mean is above zero by more than `Z` of its standard errors; False of fewer than two values."""
    if len(values) < 2:
        return False
    return bool(values.mean() > Z * values.std(ddof=1) / math.sqrt(len(values)))


def rung_units(rung: int) -> int:
    """Length of a rung in lengths of the first, which is number 0: as `optimizer.cycle_ends` cuts a training."""
    return 2**rung


def units_of(rungs: int) -> int:
    """Lengths of a first rung that so many rungs of one candidate take."""
    return 2**rungs - 1


def next_move(
    scores: Sequence[Sequence[RungScore]],
    places: Sequence[float],
    budget: Budget,
    can_extend: Callable[[int], bool] = lambda _: False,
) -> Train | Extend | Choice:
    """What a search does next, from all that its candidates have shown so far; nothing else is remembered.

    A candidate is out once one that has learned is better by more than the uncertainty of their difference and by more
    than a share `CLOSE`; while none has learned, all go on. What diverges or collapses is out from the beginning, so
    that those that it was better than are in again. One that has not learned is not chosen while another has.

    Parameters
    ----------
    scores : of each candidate, those of its rungs so far, the shortest first
    places : of each candidate, what ties are sorted by to find their middle: its value, or its place in the grid
    budget : holds a first rung of every candidate of the grid
    can_extend : whether a value beyond this candidate's can be tried, if it wins
    """
    left = budget.units - sum(units_of(len(rungs)) for rungs in scores)
    pool = [number for number, rungs in enumerate(scores) if not has_failed(rungs)]
    if not pool:
        return Choice(min(range(len(scores)), key=places.__getitem__), _sorted(range(len(scores)), places), "diverged")
    rung = -1
    for rung in range(budget.rungs):
        missing = [number for number in pool if len(scores[number]) <= rung]
        if missing and len(missing) * rung_units(rung) > left:
            rung -= 1
            break
        if missing:
            return Train(tuple(missing))
        pool = going_on(scores, pool, rung)
        if len(pool) == 1 and scores[pool[0]][rung].learned:
            break
    choice = _choice(scores, places, pool, rung)
    # The one beyond must be able to come as far as the winner itself has come.
    if len(choice.tied) == 1 and units_of(rung + 1) <= left and can_extend(choice.candidate):
        return Extend(choice.candidate)
    return choice


def has_failed(rungs: Sequence[RungScore]) -> bool:
    """Whether a candidate has diverged, or has collapsed: it had learned, and at its last rung has not."""
    if any(score.diverged for score in rungs):
        return True
    return any(score.learned for score in rungs) and not rungs[-1].learned


def going_on(scores: Sequence[Sequence[RungScore]], pool: Sequence[int], rung: int) -> list[int]:
    """Those of the pool that none that has learned beats (`is_out`) after a rung. The best of these always is one."""
    rivals = [scores[number][rung] for number in pool if scores[number][rung].learned]
    return [number for number in pool if not any(is_out(scores[number][rung], rival) for rival in rivals)]


def _choice(scores: Sequence[Sequence[RungScore]], places: Sequence[float], pool: Sequence[int], rung: int) -> Choice:
    """Choose among those that a rung has left: the middle one of those that tie, of two in the middle the lower.

    What seems as good as another with one seed may collapse with the next, and the higher rate does so more often.
    """
    if rung < 0:
        tied = _sorted(pool, places)
        return Choice(tied[(len(tied) - 1) // 2], tied, "no_budget")
    learned = [number for number in pool if scores[number][rung].learned]
    best = learned or pool
    rivals = [scores[number][rung] for number in best]
    tied = _sorted([n for n in best if not any(is_worse(scores[n][rung], rival) for rival in rivals)], places)
    undecided: SearchUndecided | None = "tied" if len(tied) > 1 else None
    return Choice(tied[(len(tied) - 1) // 2], tied, undecided if learned else "not_learned")


def _sorted(numbers: Sequence[int], places: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(numbers, key=places.__getitem__))
