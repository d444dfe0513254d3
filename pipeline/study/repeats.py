"""Which candidates train again with another seed, and which of them is chosen: by their mean over seeds.

What a candidate shows with one seed holds the luck of that seed, which no number of images takes away. So those that
the rungs have left train them again with a second seed, and with a third, as far as the budget holds that; and where
one stands out, it and the best of those that it beat. They are paired by seed and image as the arms of a comparison are
(see `pipeline.report.intervals`). With two or three seeds an interval of 95% is wide, and tells few candidates apart;
it says which ones are named as tied. The choice among these is by the rule of one standard error (Breiman et al. 1984,
Classification and Regression Trees, section 3.4.3): the middle one of those whose mean is within one of the best. With
two seeds, that one is better means that it was so with both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipeline.study.rung_scores import Rungs, RungScore, difference, is_worse, rung_units, standard_error

# Seeds that it takes to see that one was luck.
_TWO = 2


@dataclass(frozen=True)
class Survivors:
    """Candidates that the rungs have left, those that have learned or else all, with their scores of the last rung.

    scores : by the candidate's number, of each seed that has trained that rung, the first seed's first
    runner_up : where one alone is left, the best of those that have learned and that it beat at this rung, the same;
        else empty
    """

    scores: dict[int, list[RungScore]]
    runner_up: dict[int, list[RungScore]]

    @property
    def learned(self) -> bool:
        """Whether they have learned."""
        return all(of_seeds[0].learned for of_seeds in self.scores.values())

    @property
    def seeds(self) -> int:
        """How many seeds those have that have most."""
        return max(len(of_seeds) for of_seeds in self.scores.values())

    @property
    def near(self) -> list[int]:
        """Those that may be chosen: of a single seed all that are tied, of several those near the best mean.

        Only those that have most seeds are asked: each time that some got another, it was they who were near.
        """
        if self.seeds == 1:
            return self.tied
        most = [number for number, of_seeds in self.scores.items() if len(of_seeds) == self.seeds]
        best = min(most, key=lambda number: sum(score.costs.mean() for score in self.scores[number]))
        found = {number: difference(self.scores[number], self.scores[best]) for number in most}
        near = [n for n in self.tied if n in found and found[n].mean <= standard_error(found[n])]
        return near or self.tied  # of what is in again, since one that beat it has failed with its second seed

    @property
    def tied(self) -> list[int]:
        """Those that no other is better than, beyond the uncertainty of 95%."""
        return [n for n, own in self.scores.items() if not any(is_worse(own, other) for other in self.scores.values())]


def all_at(scores: Sequence[Rungs], repeats: Sequence[Sequence[Rungs]], number: int, rung: int) -> list[RungScore]:
    """The scores of a candidate at a rung, of each seed that has trained it, the first seed's first.

    Parameters
    ----------
    scores : of each candidate with the first seed
    repeats : of each candidate with every further seed
    """
    return [of_seed[rung] for of_seed in (scores[number], *repeats[number]) if len(of_seed) > rung]


def next_to_repeat(
    survivors: Survivors, repeats: Sequence[Sequence[Rungs]], rung: int, units_left: int, seeds: int
) -> tuple[tuple[int, ...], int] | None:
    """The candidates that train their next rung with another seed now, and with which; None where the search is over.

    One that stands out and its runner-up get a second seed; so do all survivors where they are several or, where the
    budget does not hold that, those that are tied. A third is for those that are near the best after two. Of a group
    all get it, or none.

    Parameters
    ----------
    rung : up to which they train
    units_left : of the budget
    seeds : of a candidate, at most; the first has the number 0
    """
    done = {number: len(of_seeds) for number, of_seeds in (survivors.scores | survivors.runner_up).items()}
    for group, most in _groups(survivors, seeds):
        seed = min((done[number] for number in group), default=seeds)
        behind = [number for number in group if done[number] == seed]
        trained = {number: len(repeats[number][seed - 1]) if len(repeats[number]) >= seed else 0 for number in behind}
        lengths = sum(rung_units(each) for begun in trained.values() for each in range(begun, rung + 1))
        if len(group) > 1 and seed < most and lengths <= units_left:
            return tuple(n for n in sorted(behind) if trained[n] == min(trained.values())), seed
    return None


def _groups(survivors: Survivors, seeds: int) -> Iterator[tuple[list[int], int]]:
    """Candidates of which each needs as many seeds as the others, and how many at most."""
    twice = min(_TWO, seeds)
    yield [*survivors.scores, *survivors.runner_up], twice
    if not survivors.runner_up:
        yield survivors.tied, twice
        yield survivors.near, seeds
