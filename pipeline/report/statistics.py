"""Results of trainings -> what they show: spread, paired differences, steps to a target, stable learning rates, cost.

Everything that a report, MLflow or a person reads of a comparison is computed here, once.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from scipy.special import stdtrit

from pipeline.report.comparison import ArmSummary, ComparedRun, Difference, SearchTrial, StudyRun
from pipeline.report.names import BATCH_SIZES, LEARNING_RATE, SettingValue

CONFIDENCE = 0.95
# Arms that a sentence names; of more, the others are counted.
_MOST_NAMES = 3
# What a reader would like to know, and the settings that would have had to vary.
_QUESTIONS = {
    "other normalizations": ("model.norm",),
    "other learning rates": (LEARNING_RATE,),
    "other batch sizes": BATCH_SIZES,
    "other depths": ("model.depth",),
    "other networks": ("model.network",),
    "other numbers of workers": ("workers.count",),
}


def with_targets(runs: Sequence[StudyRun], baseline: str, target_accuracy: float | None) -> list[ComparedRun]:
    """Each run gets its target, an accuracy, and the steps, images and seconds of training that it took to it.

    The target is ``target_accuracy`` or, where it is None, the best accuracy of the baseline's run of the same seed, as
    in figure 3 of Ioffe & Szegedy (2015). It counts as reached at the first evaluation that is at least as good; steps,
    images and seconds are None where none is.
    """
    best = {run.seed: run.best_accuracy for run in runs if run.arm == baseline}
    compared = []
    for run in runs:
        target = best[run.seed] if target_accuracy is None else target_accuracy
        reached = next((n for n, point in enumerate(run.curve) if point.accuracy >= target), None)
        steps = None if reached is None else run.curve[reached].step
        compared.append(
            ComparedRun(
                **run.model_dump(exclude_unset=True),
                target=target,
                steps_to_target=steps,
                images_to_target=None if steps is None else steps * run.global_batch,
                seconds_to_target=None if reached is None else run.train_seconds[reached],
            )
        )
    return compared


def summary_of(
    runs: Sequence[ComparedRun], base: Sequence[ComparedRun], search: Sequence[SearchTrial], chance: float
) -> ArmSummary:
    """What the runs of one arm show.

    Parameters
    ----------
    runs, base : of the arm and of the baseline, one for each seed, as `with_targets` gives them
    search : the arm's trials of the learning rates; without any, the runs themselves tell which rates are stable
    chance : accuracy of guessing, from 0 to 1
    """
    first = runs[0]
    highest, is_bound = stable_rates(search or runs, chance)
    summary = ArmSummary(
        arm=first.arm,
        values=first.values,
        tuned=first.tuned,
        global_batch=first.global_batch,
        n=len(runs),
        diverged=sum(run.diverged for run in runs),
        **_mean_and_std("best_accuracy", (run.best_accuracy for run in runs)),
        **_mean_and_std("final_accuracy", (run.final_accuracy for run in runs)),
        **_mean_and_std("final_balanced_accuracy", (run.final_balanced_accuracy for run in runs)),
        **_mean_and_std("final_macro_f1", (run.final_macro_f1 for run in runs)),
        **_mean_and_std("final_loss", (run.final_loss for run in runs)),
        **_mean_and_std("final_calibration_error", (run.final_calibration_error for run in runs)),
        reached_target=sum(run.steps_to_target is not None for run in runs),
        **_mean_and_std("images_per_second", (run.images_per_second or None for run in runs)),
        highest_stable_rate=highest,
        highest_stable_is_bound=is_bound,
        **_mean_and_std("steps_to_target", (run.steps_to_target for run in runs)),
        **_mean_and_std("images_to_target", (run.images_to_target for run in runs)),
        **_mean_and_std("seconds_to_target", (run.seconds_to_target for run in runs)),
    )
    if first.arm == base[0].arm:
        return summary
    pairs = _paired(runs, base)
    return summary.model_copy(
        update={
            "difference": paired_difference(runs, base),
            "steps_ratio": _ratio((baseline.steps_to_target, run.steps_to_target) for run, baseline in pairs),
            "seconds_ratio": _ratio((baseline.seconds_to_target, run.seconds_to_target) for run, baseline in pairs),
            "overhead": _overhead(pairs),
        }
    )


def _mean_and_std(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the values that are known; None where there are too few for one."""
    known = [value for value in values if value is not None]
    return {
        f"{name}_mean": statistics.fmean(known) if known else None,
        f"{name}_std": statistics.stdev(known) if len(known) > 1 else None,
    }


def _paired(runs: Sequence[ComparedRun], base: Sequence[ComparedRun]) -> list[tuple[ComparedRun, ComparedRun]]:
    """Each run with the baseline's run of the same seed."""
    by_seed = {run.seed: run for run in base}
    return [(run, by_seed[run.seed]) for run in runs]


def paired_difference(runs: Sequence[ComparedRun], base: Sequence[ComparedRun]) -> Difference:
    """Mean over seeds of the best accuracy minus that of the baseline's run of the seed, with Student's 95% interval.

    Runs of one seed share the order of rows and the initial weights, so pairs vary less than runs do. The interval is
    for one arm: it is not corrected for the number of arms. A single seed has none.
    """
    differences = [run.best_accuracy - baseline.best_accuracy for run, baseline in _paired(runs, base)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return Difference(mean=mean, low=None, high=None, n=n)
    # scipy.stats.ttest_rel gives the same to the last digit but one, and takes two seconds more to import.
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * statistics.stdev(differences) / math.sqrt(n)
    return Difference(mean=mean, low=mean - half, high=mean + half, n=n)


def _ratio(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Sum of the baseline's values / sum of the run's, over the seeds where both are known."""
    known = [(of_base, of_run) for of_base, of_run in pairs if of_base and of_run]
    return sum(pair[0] for pair in known) / sum(pair[1] for pair in known) if known else None


def _overhead(pairs: Iterable[tuple[ComparedRun, ComparedRun]]) -> float | None:
    """Median over seeds of the extra time for an image: 0.1 is a tenth more than the baseline's."""
    ratios = [
        baseline.images_per_second / run.images_per_second
        for run, baseline in pairs
        if run.images_per_second and baseline.images_per_second
    ]
    return statistics.median(ratios) - 1 if ratios else None


def stable_rates(trials: Sequence[SearchTrial] | Sequence[ComparedRun], chance: float) -> tuple[float | None, bool]:
    """The highest learning rate up to which all rates of the grid were stable, and how the grid bounds that.

    A rate is stable if no trial with it diverged and each ended at least half way from chance to the best accuracy of
    all these trials: a network that has collapsed computes a finite loss.

    Parameters
    ----------
    chance : accuracy of guessing, from 0 to 1

    Returns
    -------
    highest : None if no rate was stable, or fewer than two were tried
    is_bound : whether it is the highest of the grid, so that the truth may lie above
    """
    rates = sorted({trial.learning_rate for trial in trials})
    if len(rates) < 2:
        return None, False
    best = max(trial.best_accuracy for trial in trials)
    enough = chance + (best - chance) / 2
    highest = None
    for rate in rates:
        tried = [trial for trial in trials if trial.learning_rate == rate]
        if any(trial.diverged or trial.final_accuracy < enough for trial in tried):
            break
        highest = rate
    return highest, highest == rates[-1]


def warnings_of(
    arms: Sequence[ArmSummary], grid: dict[str, tuple[SettingValue, ...]], tuned: Sequence[str]
) -> list[str]:
    """Sentences that a reader should know before believing the comparison."""
    sentences = []
    if arms and arms[0].diverged:
        sentences.append(
            f"{arms[0].diverged} of {arms[0].n} runs of the baseline diverged: differences from it include them."
        )
    for name in tuned:
        values = [value for value in grid.get(name, ()) if isinstance(value, (int, float))]
        if len(values) < 2:
            continue
        for edge, where in ((min(values), "lowest"), (max(values), "highest")):
            names = [arm.arm for arm in arms if arm.tuned[name] == edge]
            if names:
                sentences.append(
                    f"The best {name} of {_some(names)} is the {where} of the grid, {edge:g}: "
                    "a better one may lie beyond it."
                )
    return sentences


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} other arms" if len(names) > _MOST_NAMES + 1 else ""
    return "; ".join(names[:_MOST_NAMES] if more else names) + more


def not_measured(grid: Iterable[str], seeds: int, *, gradient_norms: bool) -> list[str]:
    """Questions that a study does not answer.

    Parameters
    ----------
    grid : the settings that it varies
    seeds : how many it has
    gradient_norms : whether diagnostics looked at them
    """
    varied = set(grid)
    questions = [question for question, settings in _QUESTIONS.items() if varied.isdisjoint(settings)]
    if seeds < 2:
        questions.append("how much results vary with the seed (compare.seeds has one)")
    if not gradient_norms:
        questions.append("gradient norms by layer (train.diagnostics.every_steps is off)")
    return questions
