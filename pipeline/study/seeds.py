"""The trainings that are compared: every arm with every seed, or with as many seeds as it takes to be certain."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from pipeline.config import Settings
from pipeline.console import console
from pipeline.data import Manifest
from pipeline.report import statistics
from pipeline.report.comparison import StudyRun
from pipeline.report.names import Values
from pipeline.report.until_certain import open_arms
from pipeline.study.arms import Arm
from pipeline.study.summary import judge_of, predictions_of
from pipeline.study.trials import Trial, compared_trials


def run_seeds(
    settings: Settings,
    manifest: Manifest,
    arms: Sequence[Arm],
    tuned: Mapping[str, Values],
    train: Callable[[Sequence[Trial]], Sequence[StudyRun]],
) -> list[StudyRun]:
    """Train the arms with their seeds.

    With ``compare.seeds: auto`` all arms are trained with three seeds, and then with one more at a time the baseline
    and those arms whose difference from it is not certain (see `until_certain`), up to ``compare.max_seeds``. What is
    decided follows from the results alone: a study that goes on after a kill decides the same.

    Parameters
    ----------
    arms : the baseline first
    tuned : the values of the tuned settings of each arm, by its name
    train : trains trials and returns their results in their order

    Returns
    -------
    list
        The runs of each seed after each other.
    """
    options = settings.compare
    runs = list(train(compared_trials(settings, arms, tuned, options.first_seeds)))
    if options.seeds != "auto":
        return runs
    judge, still_open = judge_of(settings, manifest, searched=False), [arm.name for arm in arms[1:]]
    for seed in options.all_seeds[len(options.first_seeds) :]:
        compared = statistics.with_targets(runs, arms[0].name, options.target_accuracy, judge)
        now = open_arms(compared, predictions_of(runs), judge.metric, options.smallest_difference, options.max_seeds)
        still_open = [name for name in still_open if name in now]
        if not still_open:
            break
        _say(still_open, seed)
        more = [arm for arm in arms if arm is arms[0] or arm.name in still_open]
        runs += train(compared_trials(settings, more, tuned, [seed]))
    return runs


def _say(names: Sequence[str], seed: int) -> None:
    text = f"after {seed} seeds not certain yet: {', '.join(names)}; one more seed"
    console.print(text, soft_wrap=True)
