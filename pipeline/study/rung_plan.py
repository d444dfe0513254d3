"""How long the rungs of a search are, and how many its budget holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from pipeline.study.halving import Budget
from pipeline.study.rung_scores import rung_units, units_of

# The fewest optimizer steps of a first rung: a schedule of fewer says nothing about a learning rate.
LEAST_STEPS = 10
# What the budget holds at least: two rungs of every candidate, should all of them tie, and of one beyond the grid; and
# two rungs of two candidates with a second seed, should the others be out after the first.
_RUNGS_OF_ALL = 2
_LAST = 2
# The most seeds of a candidate: three tell whether two agreed by chance, more belong to the trainings compared.
MOST_SEEDS = 3


@dataclass(frozen=True)
class RungPlan:
    """How long the rungs of an arm's candidates are.

    first_epochs : of the first rung, at most: a candidate trains the whole steps in it
    budget : in lengths of a first rung; without any rungs where the budget holds no first rung of `LEAST_STEPS`
    """

    first_epochs: Fraction
    budget: Budget


def plan_rungs(
    *,
    share: float,
    epochs: int,
    seeds: int,
    epoch_steps: Sequence[int],
    extends: bool,
    search_seeds: int = MOST_SEEDS,
) -> RungPlan:
    """Cut the budget of an arm's search, ``share`` x seeds x epochs, into rungs.

    It holds two rungs of all K candidates, should all of them tie, and of one beyond the grid: that is 3 (K + 1) first
    rungs. And it holds, where all but two are out after the first rung, two rungs of these two with two seeds: K + 10.
    No rung is longer than a training that is compared. A candidate can train as many rungs as the budget holds if all
    but two are out after the first, and these train all of them with a second seed.

    Parameters
    ----------
    share : ``compare.search_budget``
    epochs, seeds : of the arm's trainings that are compared
    epoch_steps : optimizer steps of an epoch, of each candidate
    extends : whether the grid may be extended; if not, nothing is set aside for that
    search_seeds : that a candidate trains with at most; of a single one nothing is set aside for a second
    """
    in_all, count, twice = Fraction(str(share)) * seeds * epochs, len(epoch_steps), min(search_seeds, 2)
    least = max(units_of(_RUNGS_OF_ALL) * (count + extends), _units_if_two_are_left(count, _RUNGS_OF_ALL, twice))
    first = min(in_all / least, Fraction(epochs, 2))
    steps = [int(first * each) for each in epoch_steps]
    if min(steps) < LEAST_STEPS:
        return RungPlan(Fraction(0), Budget(0, 0))
    units = min(int(in_all * each / trained) for each, trained in zip(epoch_steps, steps, strict=True))
    rungs = 1
    while _units_if_two_are_left(count, rungs + 1, twice) <= units and rung_units(rungs) * first <= epochs:
        rungs += 1
    return RungPlan(first, Budget(units, rungs, search_seeds))


def _units_if_two_are_left(count: int, rungs: int, seeds: int) -> int:
    """Lengths of a first rung that a search takes, if all but two of its candidates are out after the first rung.

    seeds : that the two train all rungs with
    """
    return count + _LAST * (seeds * units_of(rungs) - 1)
