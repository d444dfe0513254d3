"""Which candidates of an arm train on, and which one is chosen: successive halving by what can be told apart.

Successive halving (Jamieson & Talwalkar 2016, algorithm 1; Li et al. 2018, section 3) trains all candidates for a short
first rung and the better half for a longer one, again and again. Here it is not a half that goes on, but all that
cannot be told from the best or are close to it, so that neither noise nor a head start chooses; that ends when one
stands out or the budget does not hold another rung. Rung k trains 2^(k-1) times as long as the first. Those that are
left then train the same rungs with another seed, as often as the budget holds that (see `repeats`). Pure numpy: no
trainings, no Spark.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from pipeline.report.comparison import SearchUndecided
from pipeline.study.repeats import Survivors, all_at, next_to_repeat
from pipeline.study.rung_scores import Rungs, has_failed, is_out, rung_units, units_of


@dataclass(frozen=True)
class Budget:
    """What the search of one arm may train, in lengths of a first rung.

    units : in all, by all candidates
    rungs : of one candidate
    seeds : that a candidate trains with, at most
    """

    units: int
    rungs: int
    seeds: int = 1


@dataclass(frozen=True)
class Train:
    """These candidates, by number, train their next rung now."""

    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Repeat:
    """These candidates, by number, train their next rung with this seed now: 1 is the second."""

    candidates: tuple[int, ...]
    seed: int


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
    seeds : that it rests on
    """

    candidate: int
    tied: tuple[int, ...]
    undecided: SearchUndecided | None = None
    seeds: int = 1


def next_move(
    scores: Sequence[Rungs],
    places: Sequence[float],
    budget: Budget,
    can_extend: Callable[[int], bool] = lambda _: False,
    repeats: Sequence[Sequence[Rungs]] | None = None,
) -> Train | Repeat | Extend | Choice:
    """What a search does next, from all that its candidates have shown so far; nothing else is remembered.

    A candidate is out once one that has learned is better by more than the uncertainty of their difference and by more
    than a share `CLOSE`; while none has learned, all go on. What diverges or collapses, with whatever seed, is out from
    the beginning, so that those that it was better than are in again. One that has not learned is not chosen while
    another has.

    Parameters
    ----------
    scores : of each candidate with the first seed, those of its rungs so far, the shortest first
    places : of each candidate, what ties are sorted by to find their middle: its value, or its place in the grid
    budget : holds a first rung of every candidate of the grid
    can_extend : whether a value beyond this candidate's can be tried, if it wins
    repeats : of each candidate with every further seed, the same; None where there are none yet
    """
    repeats = [()] * len(scores) if repeats is None else repeats
    left = budget.units - sum(units_of(len(of_seed)) for all_of in zip(scores, repeats, strict=True)
                              for of_seed in (all_of[0], *all_of[1]))  # fmt: skip
    pool = [number for number, rungs in enumerate(scores) if not has_failed(rungs, repeats[number])]
    if not pool:
        return Choice(min(range(len(scores)), key=places.__getitem__), _sorted(range(len(scores)), places), "diverged")
    shown = partial(all_at, scores, repeats)
    rung, before = -1, pool
    for rung in range(budget.rungs):
        missing = [number for number in pool if len(scores[number]) <= rung]
        if missing and len(missing) * rung_units(rung) > left:
            rung -= 1
            break
        if missing:
            return Train(tuple(missing))
        before, pool = pool, going_on({number: shown(number, rung) for number in pool})
        if len(pool) == 1 and scores[pool[0]][rung].learned:
            break
    survivors = _survivors({n: shown(n, rung) for n in before}, pool) if rung >= 0 else None
    choice = _choice(places, pool, survivors)
    if survivors and survivors.learned and (again := next_to_repeat(survivors, repeats, rung, left, budget.seeds)):
        return Repeat(*again)
    # The one beyond must be able to come as far as the winner itself has come.
    if len(choice.tied) == 1 and units_of(rung + 1) <= left and can_extend(choice.candidate):
        return Extend(choice.candidate)
    return choice


def going_on(pool: Mapping[int, Rungs]) -> list[int]:
    """Those of the pool that none that has learned beats (`is_out`) at a rung. The best of these always is one.

    Parameters
    ----------
    pool : scores at that rung, of each seed that has trained it, by the candidate's number
    """
    rivals = [of_seeds for of_seeds in pool.values() if of_seeds[0].learned]
    return [number for number, own in pool.items() if not any(is_out(own, rival) for rival in rivals)]


def _survivors(shown: Mapping[int, Rungs], pool: Sequence[int]) -> Survivors:
    """Those of the pool that have learned, or else all; and who is second where one alone is left.

    Parameters
    ----------
    shown : as in `going_on`, of all that have trained the pool's last rung
    """
    learned = {number: list(of_seeds) for number, of_seeds in shown.items() if of_seeds[0].learned}
    left = {number: of_seeds for number, of_seeds in learned.items() if number in pool}
    if not left:
        return Survivors({number: list(shown[number]) for number in pool}, {})
    beaten = {number: of_seeds for number, of_seeds in learned.items() if number not in pool}
    if len(left) > 1 or not beaten:
        return Survivors(left, {})
    second = min(beaten, key=lambda number: beaten[number][0].costs.mean())
    return Survivors(left, {second: beaten[second]})


def _choice(places: Sequence[float], pool: Sequence[int], survivors: Survivors | None) -> Choice:
    """Choose among those that the rungs have left: the middle one of those near the best, of two the lower.

    What seems as good as another with one seed may collapse with the next, and the higher rate does so more often.

    Parameters
    ----------
    survivors : of the pool at its last rung; None where not even a first one was trained
    """
    if survivors is None:
        tied = _sorted(pool, places)
        return Choice(tied[(len(tied) - 1) // 2], tied, "no_budget")
    near, tied = _sorted(survivors.near, places), _sorted(survivors.tied, places)
    undecided: SearchUndecided | None = "tied" if len(tied) > 1 else None
    undecided = undecided if survivors.learned else "not_learned"
    return Choice(near[(len(near) - 1) // 2], tied, undecided, survivors.seeds)


def _sorted(numbers: Sequence[int], places: Sequence[float]) -> tuple[int, ...]:
    return tuple(sorted(numbers, key=places.__getitem__))
