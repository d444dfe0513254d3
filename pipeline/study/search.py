"""The search for an arm's values of the tuned settings: what each candidate trains, rung by rung, and what is chosen.

`halving` decides; here are the candidates' settings, the lengths that the budget allows, and the values beyond a grid.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TypeGuard

import numpy as np

from pipeline.config import Settings
from pipeline.config.training import TrainSettings
from pipeline.data import Manifest
from pipeline.driver.checks import check_dataset, check_network
from pipeline.report.comparison import SearchTrial, StudyRun
from pipeline.report.names import SettingValue, Values
from pipeline.study.arms import Arm
from pipeline.study.halving import Budget, Choice, Extend, RungScore, has_learned, next_move, rung_units, units_of
from pipeline.study.trials import Trial

# The fewest optimizer steps of a first rung: a schedule of fewer says nothing about a learning rate.
LEAST_STEPS = 10
# What the budget holds at least: two rungs of every candidate, should all of them tie, and of one beyond the grid.
_RUNGS_OF_ALL = 2
# Sections of the settings in which a value beyond the grid can be tried; workers, for one, must be there.
_EXTENDABLE = ("train", "model")


@dataclass(frozen=True)
class RungPlan:
    """How long the rungs of an arm's candidates are.

    first_epochs : of the first rung, at most: a candidate trains the whole steps in it
    budget : in lengths of a first rung; without any rungs where the budget holds no first rung of `LEAST_STEPS`
    """

    first_epochs: Fraction
    budget: Budget


def plan_rungs(*, share: float, epochs: int, seeds: int, epoch_steps: Sequence[int], extends: bool) -> RungPlan:
    """Cut the budget of an arm's search, ``share`` x seeds x epochs, into rungs.

    It holds two rungs of all K candidates, should all of them tie, and of one beyond the grid: that is 3 (K + 1) first
    rungs. No rung is longer than a training that is compared. A candidate can train as many rungs as the budget holds
    if all but two are out after the first.

    Parameters
    ----------
    share : ``compare.search_budget``
    epochs, seeds : of the arm's trainings that are compared
    epoch_steps : optimizer steps of an epoch, of each candidate
    extends : whether the grid may be extended; if not, nothing is set aside for that
    """
    in_all, count = Fraction(str(share)) * seeds * epochs, len(epoch_steps)
    first = min(in_all / (units_of(_RUNGS_OF_ALL) * (count + extends)), Fraction(epochs, 2))
    steps = [int(first * each) for each in epoch_steps]
    if min(steps) < LEAST_STEPS:
        return RungPlan(Fraction(0), Budget(0, 0))
    units = min(int(in_all * each / trained) for each, trained in zip(epoch_steps, steps, strict=True))
    rungs = 1
    while count + 2 * (units_of(rungs + 1) - 1) <= units and rung_units(rungs) * first <= epochs:
        rungs += 1
    return RungPlan(first, Budget(units, rungs))


def value_beyond(edge: SettingValue, inner: SettingValue) -> int | float | None:
    """The value beyond the edge of a grid by the factor between the edge and the value next to it.

    None where there is none: of values that are not positive numbers, and of whole numbers whose next is not whole.
    """
    if not _is_number(edge) or not _is_number(inner) or min(edge, inner) <= 0:
        return None
    value = Fraction(str(edge)) ** 2 / Fraction(str(inner))
    if isinstance(edge, int) and isinstance(inner, int):
        return int(value) if value.denominator == 1 else None
    return float(f"{float(value):.6g}")


def _is_number(value: SettingValue) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass
class Candidate:
    """Values of the tuned settings that an arm tries.

    settings : of its one trial, whose schedule has a cycle for each rung
    beyond_grid : whether the grid lacks it
    runs, scores : of its rungs so far
    """

    tuned: Values
    settings: Settings
    beyond_grid: bool = False
    runs: list[StudyRun] = field(default_factory=list)
    scores: list[RungScore] = field(default_factory=list)

    @property
    def images(self) -> int:
        """Training images that its trial has taken so far."""
        return self.runs[-1].steps * self.runs[-1].global_batch if self.runs else 0


class ArmSearch:
    """The search of one arm. It remembers nothing but the results: from the same ones it goes on in the same way.

    Parameters
    ----------
    settings : of the study
    values : of the tuned settings, of each candidate of the grid; at least two
    manifest : of the dataset

    Attributes
    ----------
    choice : what was chosen; None while there is something to train
    """

    def __init__(self, settings: Settings, arm: Arm, values: Sequence[Values], manifest: Manifest):
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
        )
        self.candidates = [self._candidate(tuned) for tuned in values]

    def next_trials(self) -> list[Trial]:
        """What is to be trained now; nothing once the choice is made."""
        while self.choice is None:
            scores = [candidate.scores for candidate in self.candidates]
            move = next_move(scores, self._places(), self.plan.budget, lambda number: bool(self._beyond(number)))
            if isinstance(move, Choice):
                self.choice = move
            elif isinstance(move, Extend):
                self.candidates += self._beyond(move.beyond)
            else:
                return [self._trial(self.candidates[number]) for number in move.candidates]
        return []

    def add(self, trial: Trial, run: StudyRun) -> None:
        """Take up the result of a trial of `next_trials`."""
        candidate = next(each for each in self.candidates if each.tuned == trial.tuned)
        candidate.runs.append(run)
        weights = weights_of_classes(trial.settings.train, self._manifest)
        candidate.scores.append(score_of(run, self._settings.compare.search_metric, weights))

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
        """Each candidate that was trained, as far as it came."""
        return [
            SearchTrial(
                **candidate.runs[-1].model_dump(include=set(SearchTrial.model_fields), exclude_unset=True),
                learned=candidate.scores[-1].learned,
                rungs=len(candidate.runs),
                beyond_grid=candidate.beyond_grid,
            )
            for candidate in self.candidates
            if candidate.runs
        ]

    def _trial(self, candidate: Candidate) -> Trial:
        return Trial("search", self.arm, candidate.tuned, candidate.settings, cycle=len(candidate.runs) + 1)

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
        return Candidate(tuned, self._settings.with_values({**own, **short}), beyond_grid)

    def _epoch_steps(self, settings: Settings) -> int:
        from pipeline.data.loader import steps_per_epoch

        return steps_per_epoch(self._manifest, settings.train, settings.reader, settings.workers.count)

    def _places(self) -> list[float]:
        """What candidates are sorted by: the value of a single number, or else their place in the grid."""
        values = [value for candidate in self.candidates for value in candidate.tuned.values()]
        numbers = [float(value) for value in values if _is_number(value)]
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


def score_of(run: StudyRun, metric: str, class_weights: np.ndarray | None = None) -> RungScore:
    """What a rung has shown, from the predictions that its last evaluation has left.

    Parameters
    ----------
    metric : ``compare.search_metric``
    class_weights : see `weights_of_classes`
    """
    from pipeline.training.predictions import read

    assert run.predictions is not None, run.run_id
    found = read(run.predictions)
    wrong = (found.prediction != found.label).astype(np.float64)
    costs = found.loss.astype(np.float64) if metric == "cross_entropy" else wrong
    weights = np.ones(len(found)) if class_weights is None else class_weights[found.label]
    diverged = run.diverged or not np.isfinite(found.loss).all()
    learned = not diverged and has_learned(found.label, found.prediction, weights)
    return RungScore(weights * costs, learned, bool(diverged))


def weights_of_classes(train: TrainSettings, manifest: Manifest) -> np.ndarray | None:
    """How much an image of each class counts in what an arm is trained for: its class weights, and its sampling.

    An arm that is trained to balance the classes is not judged by how often it names the largest one.

    Returns
    -------
    float64 (classes,); None where every image counts alike
    """
    from pipeline.training.class_weights import weights_of

    weights = weights_of(train, manifest)
    if train.sampling != "balanced":
        return weights
    counts = np.array(manifest.split("train").label_counts, dtype=np.float64)
    even = counts.sum() / (np.count_nonzero(counts) * np.maximum(counts, 1))
    return even if weights is None else weights * even


def run_search(searches: Sequence[ArmSearch], train: Callable[[Sequence[Trial]], Sequence[StudyRun]]) -> None:
    """Train the rungs of all arms together, so that slots stay busy, until every arm has its values.

    Parameters
    ----------
    train : trains trials and returns their results in their order
    """
    while wanted := [(search, trial) for search in searches for trial in search.next_trials()]:
        for (search, trial), run in zip(wanted, train([trial for _, trial in wanted]), strict=True):
            search.add(trial, run)
