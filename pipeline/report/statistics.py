"""Results of trainings -> what they show: spread, paired differences, steps to a target, stable learning rates, cost.

Everything that a report, MLflow or a person reads of a comparison is computed here, once.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Generic, NamedTuple, TypeVar

from pipeline.report.comparison import ArmSummary, ComparedRun, Objective, SearchTrial, StudyRun, by
from pipeline.report.differences import (
    Pair,
    PredictionsOf,
    difference_of,
    mcnemar_of,
    paired,
    with_adjusted_p_values,
)
from pipeline.report.grades import grade_of
from pipeline.report.learned import constant_score, goodness, learned, score_at, score_of
from pipeline.report.names import BATCH_SIZES, LEARNING_RATE, SettingValue, is_number

# `Metric` in a comparison, `Objective` in a search.
AnyObjective = TypeVar("AnyObjective", bound=Objective, covariant=True)
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


class Judge(NamedTuple, Generic[AnyObjective]):
    """What results are judged by.

    metric : of the comparison, or of a search
    counts : images of each class in the split that the arms are evaluated on
    search_counts : the same of the split that chose tuned values; empty where nothing was chosen
    smallest_difference : of interest, from 0 to 1
    max_seeds : of a study that adds seeds until it is certain; None where their number was fixed before
    """

    metric: AnyObjective
    counts: Sequence[int]
    search_counts: Sequence[int]
    smallest_difference: float
    max_seeds: int | None = None


def with_targets(
    runs: Sequence[StudyRun], baseline: str, target_accuracy: float | None, judge: Judge[Objective]
) -> list[ComparedRun]:
    """Each run gets its score, its target, and the steps, images and seconds of training that it took to that.

    The target is ``target_accuracy`` or, where it is None, the score at the end of the baseline's run of the same seed,
    after figure 3 of Ioffe & Szegedy (2015): not its best, which would be chosen on the split that judges. It counts as
    reached at the first evaluation that is at least as good; steps, images and seconds are None where none is. Where
    that run of the baseline diverged or did not learn there is no target.
    """
    scores = {(run.arm, run.seed): score_of(run, judge.metric) for run in runs}
    healthy = {(run.arm, run.seed): learned(run.recall, judge.metric, judge.counts) for run in runs}
    fallen = {run.seed for run in runs if run.arm == baseline and (run.diverged or not healthy[baseline, run.seed])}
    compared = []
    for run in runs:
        target = target_accuracy
        if target is None and run.seed not in fallen:
            target = scores[baseline, run.seed]
        reached = None if target is None else _first_at_least(target, run, judge.metric)
        steps = None if reached is None else run.curve[reached].step
        compared.append(
            ComparedRun(
                **run.model_dump(exclude_unset=True),
                score=scores[run.arm, run.seed],
                learned=healthy[run.arm, run.seed],
                target=target,
                steps_to_target=steps,
                images_to_target=None if steps is None else steps * run.global_batch,
                seconds_to_target=None if reached is None else run.train_seconds[reached],
            )
        )
    return compared


def _first_at_least(target: float, run: StudyRun, metric: Objective) -> int | None:
    """The number of the first evaluation of a run that is at least as good; None where none is."""
    enough = goodness(target, metric)
    evaluated = (goodness(score_at(point, metric), metric) for point in run.curve)
    return next((number for number, value in enumerate(evaluated) if value >= enough), None)


def summaries_of(
    runs: Sequence[ComparedRun], search: Sequence[SearchTrial], predictions: PredictionsOf, judge: Judge[Objective]
) -> list[ArmSummary]:
    """What the runs of each arm show, the baseline first.

    Parameters
    ----------
    runs : every arm with every seed, the baseline first, as `with_targets` gives them
    search : trials of the tuned values
    predictions : of the runs, as far as they are there
    """
    runs_of, trials_of = by(runs, lambda run: run.arm), by(search, lambda trial: trial.arm)
    base = runs_of[runs[0].arm]
    arms = [_summary_of(of_arm, base, trials_of.get(name, ()), predictions, judge) for name, of_arm in runs_of.items()]
    if len(arms) == 2 and arms[1].difference:
        p_value = mcnemar_of(runs_of[arms[1].arm], base, predictions)
        if p_value is not None:
            difference = arms[1].difference.model_copy(update={"mcnemar_p": p_value})
            arms[1] = arms[1].model_copy(update={"difference": difference})
    arms = with_adjusted_p_values(arms)
    grades = {arm.arm: grade_of(arm, arms[0], judge.smallest_difference) for arm in arms}
    return [arm if grades[arm.arm] is None else arm.model_copy(update={"grade": grades[arm.arm]}) for arm in arms]


def _summary_of(
    runs: Sequence[ComparedRun],
    base: Sequence[ComparedRun],
    search: Sequence[SearchTrial],
    predictions: PredictionsOf,
    judge: Judge[Objective],
) -> ArmSummary:
    first, sound = runs[0], [run for run in runs if run.is_healthy] or runs
    highest, is_bound = stable_rates(search or runs, judge.metric, judge.search_counts if search else judge.counts)
    summary = ArmSummary(
        arm=first.arm,
        values=first.values,
        tuned=first.tuned,
        global_batch=first.global_batch,
        n=len(runs),
        diverged=sum(run.diverged for run in runs),
        not_learned=sum(not run.learned and not run.diverged for run in runs),
        **_mean_and_std("score", (run.score for run in sound)),
        **_mean_and_std("best_accuracy", (run.best_accuracy for run in runs)),
        **_mean_and_std("final_accuracy", (run.final_accuracy for run in runs)),
        **_mean_and_std("final_balanced_accuracy", (run.final_balanced_accuracy for run in runs)),
        **_mean_and_std("final_macro_f1", (run.final_macro_f1 for run in runs)),
        **_mean_and_std("final_loss", (run.final_loss for run in runs)),
        **_mean_and_std("final_calibration_error", (run.final_calibration_error for run in runs)),
        had_target=sum(run.target is not None for run in runs),
        reached_target=sum(run.steps_to_target is not None for run in runs),
        **_mean_and_std("images_per_second", (run.images_per_second or None for run in sound)),
        highest_stable_rate=highest,
        highest_stable_is_bound=is_bound,
        **_mean_and_std("steps_to_target", (run.steps_to_target for run in runs)),
        **_mean_and_std("images_to_target", (run.images_to_target for run in runs)),
        **_mean_and_std("seconds_to_target", (run.seconds_to_target for run in runs)),
    )
    if first.arm == base[0].arm:
        return summary
    pairs = paired(runs, base)
    difference = difference_of(runs, base, predictions, judge.metric, judge.smallest_difference, judge.max_seeds)
    return summary.model_copy(
        update={
            **({} if difference is None else {"difference": difference}),
            "steps_ratio": _ratio((baseline.steps_to_target, run.steps_to_target) for run, baseline in pairs),
            "seconds_ratio": _ratio((baseline.seconds_to_target, run.seconds_to_target) for run, baseline in pairs),
            **_overhead(pairs),
        }
    )


def _mean_and_std(name: str, values: Iterable[float | None]) -> dict[str, float | None]:
    """Mean and sample standard deviation of the values that are known; None where there are too few for one."""
    known = [value for value in values if value is not None]
    return {
        f"{name}_mean": statistics.fmean(known) if known else None,
        f"{name}_std": statistics.stdev(known) if len(known) > 1 else None,
    }


def _ratio(pairs: Iterable[tuple[float | None, float | None]]) -> float | None:
    """Sum of the baseline's values / sum of the run's, over the seeds where both are known."""
    known = [(of_base, of_run) for of_base, of_run in pairs if of_base and of_run]
    return sum(pair[0] for pair in known) / sum(pair[1] for pair in known) if known else None


def _overhead(pairs: Iterable[Pair]) -> dict[str, float | None]:
    """Extra time for an image, 0.1 is a tenth more than the baseline's: median, least and most over seeds."""
    extra = [
        baseline.images_per_second / run.images_per_second - 1
        for run, baseline in pairs
        if run.images_per_second and baseline.images_per_second
    ]
    if len(extra) < 2:
        return {"overhead": extra[0] if extra else None}
    return {"overhead": statistics.median(extra), "overhead_low": min(extra), "overhead_high": max(extra)}


def stable_rates(
    trials: Sequence[SearchTrial] | Sequence[ComparedRun], metric: Objective, counts: Sequence[int]
) -> tuple[float | None, bool]:
    """The highest learning rate up to which all rates that were tried were stable, and how these bound that.

    A rate is stable if no trial with it diverged or did not learn, and each ended at least half way from the best
    constant answer to the best of all these trials: a network that has collapsed computes a finite loss. Of a rate
    below the best one that is too slow for so short a trial nothing is known: it is passed over.

    Parameters
    ----------
    counts : images of each class in the split that the trials were evaluated on

    Returns
    -------
    highest : None if no rate was stable, or fewer than two were tried
    is_bound : whether it is the highest that was tried, so that the truth may lie above
    """
    rates = sorted({trial.learning_rate for trial in trials})
    if len(rates) < 2:
        return None, False
    constant = goodness(constant_score(metric, counts), metric)
    scored = [(trial, goodness(score_of(trial, metric), metric)) for trial in trials]
    enough = constant + (max(score for _, score in scored) - constant) / 2
    best_rate = max((not trial.diverged, score, trial.learning_rate) for trial, score in scored)[-1]
    highest = None
    for rate in rates:
        tried = [trial for trial in trials if trial.learning_rate == rate]
        scores = [score for trial, score in scored if trial.learning_rate == rate]
        if any(trial.diverged for trial in tried):
            break
        if all(trial.learned for trial in tried) and min(scores) >= enough:
            highest = rate
        elif rate >= best_rate:
            break
            break
    return highest, highest == rates[-1]


def warnings_of(
    arms: Sequence[ArmSummary],
    grid: dict[str, tuple[SettingValue, ...]],
    tuned: Sequence[str],
    search: Sequence[SearchTrial] = (),
) -> list[str]:
    """Sentences that a reader should know before believing the comparison.

    search : every trial of it; a grid that was extended has its edges where the arm's last trials are
    """
    sentences = []
    if arms and 0 < arms[0].healthy < arms[0].n:
        fallen = arms[0].n - arms[0].healthy
        sentences.append(
            f"{fallen} of {arms[0].n} runs of the baseline diverged or did not learn: differences from it are over the "
            "other seeds."
        )
    if any(arm.difference and arm.difference.covers == "seeds" for arm in arms):
        sentences.append(
            "Intervals are over seeds alone: the predictions of some runs are not there, or of other images. How much "
            "the choice of test images matters is not in them."
        )
    for name in tuned:
        names: dict[str, list[str]] = {}
        for arm in arms:
            tried = [trial.tuned[name] for trial in search if trial.arm == arm.arm]
            values = [value for value in (*grid.get(name, ()), *tried) if is_number(value)]
            if len(set(values)) < 2 or arm.search_undecided == "no_budget":
                continue
            for edge, where in ((min(values), "lowest"), (max(values), "highest")):
                if arm.tuned[name] == edge:
                    whose = "of the grid" if edge in grid.get(name, ()) else "that was tried"
                    names.setdefault(f"is the {where} {whose}, {edge:g}", []).append(arm.arm)
        sentences += [
            f"The best {name} of {_some(names[where])} {where}: a better one may lie beyond it."
            for where in sorted(names, key=lambda text: "highest" in text)
        ]
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
