"""The best trials of a search, trained again with new seeds, and the winner of these for the test split."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from pipeline.console import console
from pipeline.driver import slots
from pipeline.report import statistics
from pipeline.report.comparison import Objective, StudyRun
from pipeline.report.confirmation import confirmed_trials, seed_score, test_figure
from pipeline.report.learned import goodness, learned, score_of
from pipeline.report.score_text import ScoreText
from pipeline.report.tuning import ConfirmedTrial, TestFigure
from pipeline.study.summary import predictions_of
from pipeline.study.tuning.space import trial_settings, winner_settings
from pipeline.study.tuning.trials import Stage

if TYPE_CHECKING:
    from pipeline.study.tuning.sampling import SearchedTrial


def confirm(stage: Stage, trials: Sequence[SearchedTrial]) -> tuple[list[ConfirmedTrial], TestFigure | None]:
    """Train the best ``tune.confirm`` trials with ``tune.confirm_seeds`` on the split that chooses, and the one with
    the best mean on the one that judges.

    Returns
    -------
    confirmed
        The winner first; empty where ``tune.confirm`` is 0.
    test
        The winner's figure; None where nothing was confirmed.
    """
    options = stage.settings.tune
    best = best_trials(trials, options.confirm, stage.metric)
    if not best:
        return [], None
    names = ", ".join(str(trial.number) for trial in best)
    _say(f"{stage.settings.name}: the best trials ({names}) with {len(options.confirm_seeds)} new seeds")
    jobs = [partial(_train, stage, trial, seed, False) for seed in options.confirm_seeds for trial in best]
    runs = slots.run_all(stage.spark, jobs, stage.at_once, stage.lease.stop)
    counts = stage.manifest.split(options.search_on).label_counts
    judge = statistics.Judge(stage.metric, counts, (), stage.settings.compare.smallest_difference)
    searched = {trial.number: trial.value or 0.0 for trial in best}
    confirmed = confirmed_trials(runs, searched, predictions_of(runs), judge)
    winner = next(trial for trial in best if trial.number == confirmed[0].number)
    return confirmed, _test(stage, winner)


def best_trials(trials: Sequence[SearchedTrial], count: int, metric: Objective) -> list[SearchedTrial]:
    """The complete trials with the best values, each combination of values once; of equals the earlier ones."""
    complete = [each for each in trials if each.state == "complete" and "same_as" not in each.facts]
    return sorted(complete, key=lambda trial: (-goodness(trial.value or 0.0, metric), trial.number))[:count]


def _test(stage: Stage, winner: SearchedTrial) -> TestFigure:
    options, split = stage.settings.tune, stage.settings.train.evaluate_on
    jobs = [partial(_train, stage, winner, seed, True) for seed in options.confirm_seeds]
    runs = slots.run_all(stage.spark, jobs, stage.at_once, stage.lease.stop)
    counts = stage.manifest.split(split).label_counts
    scores = [seed_score(run, score_of(run, stage.metric), learned(run.recall, stage.metric, counts)) for run in runs]
    return test_figure(split, scores)


def _train(stage: Stage, trial: SearchedTrial, seed: int, tests: bool, slot: slots.TrainingSlot) -> StudyRun:
    """Train the values of a trial with a seed; ``tests`` says that it is evaluated on the split that judges."""
    values = trial.values
    settings = (winner_settings if tests else trial_settings)(stage.settings, values, seed=seed)
    kind = "test" if tests else "confirm"
    tags = {"kind": kind, "trial": trial.number, "seed": seed}
    name = f"{stage.settings.name} {kind} trial {trial.number} seed={seed}"
    result = stage.train(name, settings, slot, log_model=tests, tags=tags)
    unit, score = ScoreText(stage.metric), score_of(result, stage.metric)
    is_sound = not result.diverged and math.isfinite(score)
    words = f"{unit.name} {unit.text(score)}" if is_sound else "diverged"
    _say(f"{stage.settings.name} trial {trial.number} seed {seed}: {words} on {settings.train.evaluate_on}")
    train = settings.train
    return StudyRun(
        arm=str(trial.number),
        values=values,
        tuned={},
        learning_rate=train.learning_rate,
        global_batch=train.global_batch,
        seed=seed,
        **result.model_dump(exclude_unset=True),
    )


def _say(text: str) -> None:
    console.print(text, soft_wrap=True)
