"""The search for an arm's values of the tuned settings: what each candidate trains, rung by rung, and what is chosen.

`halving` decides; here are the candidates' settings, the lengths that the budget allows, and the values beyond a grid.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from pipeline.config import Settings
from pipeline.data import Manifest
from pipeline.driver.checks import check_dataset, check_network
from pipeline.report.comparison import SearchTrial, StudyRun
from pipeline.report.names import Values
from pipeline.study.arms import Arm
from pipeline.study.candidates import (
    Candidate,
    CandidateSeed,
    is_number,
    score_of,
    value_beyond,
    weights_of_classes,
)
from pipeline.study.halving import Choice, Extend, Repeat, next_move
from pipeline.study.rung_plan import LEAST_STEPS, MOST_SEEDS, plan_rungs
from pipeline.study.rung_scores import units_of
from pipeline.study.trials import Trial

# Sections of the settings in which a value beyond the grid can be tried; workers, for one, must be there.
_EXTENDABLE = ("train", "model")


class ArmSearch:
    """The search of one arm. It remembers nothing but the results: from the same ones it goes on in the same way.

    Parameters
    ----------
    settings : of the study
    values : of the tuned settings, of each candidate of the grid; at least two
    manifest : of the dataset
    search_seeds : that a candidate trains with, at most

    Attributes
    ----------
    choice : what was chosen; None while there is something to train
    """

    def __init__(
        self,
        settings: Settings,
        arm: Arm,
        values: Sequence[Values],
        manifest: Manifest,
        *,
        search_seeds: int = MOST_SEEDS,
    ):
        self.arm = arm
        self.choice: Choice | None = None
        self._settings, self._manifest = settings, manifest
        tuned_numbers = {type(value) for tuned in values for value in tuned.values()} <= {int, float}
        self.plan = plan_rungs(
            extends=settings.compare.search_extensions > 0 and tuned_numbers and len(values[0]) == 1,
            share=settings.compare.search_budget,
            epochs=arm.settings.train.epochs,
            seeds=len(settings.compare.first_seeds),
            epoch_steps=[self._epoch_steps(settings.with_values({**arm.values, **tuned})) for tuned in values],
            search_seeds=search_seeds,
        )
        self.candidates = [self._candidate(tuned) for tuned in values]

    def next_trials(self) -> list[Trial]:
        """What is to be trained now; nothing once the choice is made."""
        while self.choice is None:
            move = next_move(
                [candidate.scores for candidate in self.candidates],
                self._places(),
                self.plan.budget,
                lambda number: bool(self._beyond(number)),
                [candidate.repeats for candidate in self.candidates],
            )
            if isinstance(move, Choice):
                self.choice = move
            elif isinstance(move, Extend):
                self.candidates += self._beyond(move.beyond)
            else:
                seed = move.seed if isinstance(move, Repeat) else 0
                return [self._trial(self.candidates[number], seed) for number in move.candidates]
        return []

    def add(self, trial: Trial, run: StudyRun) -> None:
        """Take up the result of a trial of `next_trials`."""
        candidate = next(each for each in self.candidates if each.tuned == trial.tuned)
        of_seed = next(each for each in candidate.seeds if each.settings == trial.settings)
        of_seed.runs.append(run)
        weights = weights_of_classes(trial.settings.train, self._manifest)
        of_seed.scores.append(score_of(run, self._settings.compare.search_metric, weights))

    @property
    def tuned(self) -> Values:
        """The values that were chosen."""
        return self.candidates[self._chosen.candidate].tuned

    @property
    def tied(self) -> list[Values]:
        """All values that could not be told from those; none where they stand out."""
        return [self.candidates[number].tuned for number in self._chosen.tied] if len(self._chosen.tied) > 1 else []

    @property
    def _chosen(self) -> Choice:
        assert self.choice is not None
        return self.choice

    @property
    def images(self) -> int:
        """Training images that the search has taken."""
        return sum(candidate.images for candidate in self.candidates)

    @property
    def compared_images(self) -> int:
        """Training images of the trainings that are compared, with the values chosen, if none ends early."""
        settings = self._settings.with_values({**self.arm.values, **self.tuned})
        steps = self._epoch_steps(settings) * settings.train.epochs
        return steps * settings.train.global_batch * len(self._settings.compare.first_seeds)

    def trials(self) -> list[SearchTrial]:
        """Each candidate with each seed that it was trained with, as far as it came; the first seed of all first."""
        trained = [(seed, each) for each in self.candidates for seed, of in enumerate(each.seeds) if of.runs]
        return [
            SearchTrial(
                **each.seeds[seed].runs[-1].model_dump(include=set(SearchTrial.model_fields), exclude_unset=True),
                learned=each.seeds[seed].scores[-1].learned,
                rungs=len(each.seeds[seed].runs),
                beyond_grid=each.beyond_grid,
            )
            for seed, each in sorted(trained, key=lambda pair: pair[0])
        ]

    def _trial(self, candidate: Candidate, seed: int) -> Trial:
        """The next rung of a candidate; a seed that it has not begun is the one after those that it has."""
        if seed == len(candidate.seeds):
            train = candidate.settings.train.model_copy(update={"seed": self._seeds[seed]})
            candidate.seeds.append(CandidateSeed(candidate.settings.model_copy(update={"train": train})))
        of_seed = candidate.seeds[seed]
        return Trial("search", self.arm, candidate.tuned, of_seed.settings, cycle=len(of_seed.runs) + 1, repeat=seed)

    @property
    def _seeds(self) -> list[int]:
        """Seeds of a candidate's trials: from ``compare.search_seed`` on, without those that are compared."""
        options = self._settings.compare
        later = (seed for seed in itertools.count(options.search_seed + 1) if seed not in options.all_seeds)
        return [options.search_seed, *itertools.islice(later, MOST_SEEDS - 1)]

    def _candidate(self, tuned: Values, *, beyond_grid: bool = False) -> Candidate:
        options, own = self._settings.compare, {**self.arm.values, **tuned}
        epoch_steps = self._epoch_steps(self._settings.with_values(own))
        steps = max(1, int(self.plan.first_epochs * epoch_steps))
        short: Values = {
            "train.seed": options.search_seed,
            "train.epochs": max(1, math.ceil(Fraction(steps * units_of(self.plan.budget.rungs), epoch_steps))),
            "train.first_cycle_epochs": steps / epoch_steps,
            "train.evaluate_on": options.search_on,
            "train.evaluations_per_epoch": 1,
            "train.final_network": "last",
        }
        return Candidate(tuned, [CandidateSeed(self._settings.with_values({**own, **short}))], beyond_grid)

    def _epoch_steps(self, settings: Settings) -> int:
        from pipeline.data.loader import steps_per_epoch

        return steps_per_epoch(self._manifest, settings.train, settings.reader, settings.workers.count)

    def _places(self) -> list[float]:
        """What candidates are sorted by: the value of a single number, or else their place in the grid."""
        values = [value for candidate in self.candidates for value in candidate.tuned.values()]
        numbers = [float(value) for value in values if is_number(value)]
        return (
            numbers
            if len(numbers) == len(values) == len(self.candidates)
            else [float(place) for place in range(len(self.candidates))]
        )

    def _beyond(self, number: int) -> list[Candidate]:
        """The candidate beyond this one, if it is at an edge of a grid of one number that may be extended there."""
        places = self._places()
        (name, edge), *others = self.candidates[number].tuned.items()
        at_edge = [sign for sign in (1, -1) if all(sign * place <= sign * places[number] for place in places)]
        if others or not at_edge or name.partition(".")[0] not in _EXTENDABLE:
            return []
        in_grid = [place for place, each in zip(places, self.candidates, strict=True) if not each.beyond_grid]
        made = sum(all(at_edge[0] * place > at_edge[0] * each for each in in_grid) for place in places)
        inner = sorted(range(len(places)), key=lambda each: at_edge[0] * places[each])[-2]
        value = value_beyond(edge, self.candidates[inner].tuned[name])
        if made >= self._settings.compare.search_extensions or value is None:
            return []
        try:
            candidate = self._candidate({name: value}, beyond_grid=True)
            check_dataset(candidate.settings, self._manifest)
            check_network(candidate.settings, self._manifest)
        except ValueError:  # there is no such network, batch or probability
            return []
        steps = self.plan.first_epochs * self._epoch_steps(candidate.settings)
        return [candidate] if steps >= LEAST_STEPS else []


def run_search(searches: Sequence[ArmSearch], train: Callable[[Sequence[Trial]], Sequence[StudyRun]]) -> None:
    """Train the rungs of all arms together, so that slots stay busy, until every arm has its values.

    Parameters
    ----------
    train : trains trials and returns their results in their order
    """
    while wanted := [(search, trial) for search in searches for trial in search.next_trials()]:
        for (search, trial), run in zip(wanted, train([trial for _, trial in wanted]), strict=True):
            search.add(trial, run)
