"""Runs of an arm and of the baseline -> their difference, with intervals over seeds and over test images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from pipeline.config.study import FIRST_LOOK
from pipeline.report.comparison import ArmSummary, ComparedRun, Difference, Objective
from pipeline.report.intervals import Spread, image_covariance, spread_of, unseen_variance
from pipeline.report.sequential import decide, p_value_of
from pipeline.report.significance import holm, mcnemar
from pipeline.training.predictions import Predictions

# The predictions of runs, by the name of the arm and the seed.
PredictionsOf = Mapping[tuple[str, int], Predictions]
Pair = tuple[ComparedRun, ComparedRun]


def paired(runs: Sequence[ComparedRun], base: Sequence[ComparedRun]) -> list[Pair]:
    """Each run with the other arm's run of the same seed, where neither diverged or did not learn.

    Arms have the same seeds, but where they are added until certain: then one arm may have stopped before the other.
    """
    by_seed = {run.seed: run for run in base}
    pairs = [(run, by_seed[run.seed]) for run in runs if run.seed in by_seed]
    return [pair for pair in pairs if pair[0].is_healthy and pair[1].is_healthy]


def difference_of(
    runs: Sequence[ComparedRun],
    base: Sequence[ComparedRun],
    predictions: PredictionsOf,
    metric: Objective,
    smallest_difference: float,
    max_seeds: int | None = None,
) -> Difference | None:
    """The metric of an arm minus that of the baseline, paired by seed.

    Runs of one seed share the order of rows and the initial weights, so pairs vary less than runs do. The interval is
    for one arm: it is not corrected for the number of arms, which `with_adjusted_p_values` does for the p-values.

    Parameters
    ----------
    runs, base : of the arm and of the baseline, one for each seed
    predictions : of these runs; where any is missing, intervals are over seeds alone
    smallest_difference : of interest, in the unit of the metric
    max_seeds : where seeds were added until the difference was certain: interval and p-value are those of `sequential`

    Returns
    -------
    None where no seed has two runs that neither diverged nor failed to learn.
    """
    spread = spread_between(runs, base, predictions, metric)
    return None if spread is None else _difference(spread, smallest_difference, max_seeds)


def spread_between(
    runs: Sequence[ComparedRun], others: Sequence[ComparedRun], predictions: PredictionsOf, metric: Objective
) -> Spread | None:
    """The mean of runs minus others, paired by seed, and how far it would vary; None where no pair is sound."""
    pairs = paired(runs, others)
    if not pairs:
        return None
    by_seed = np.array([run.score - baseline.score for run, baseline in pairs])
    scores = _image_scores(pairs, predictions, _losses if metric == "cross_entropy" else _hits)
    if scores is None:
        return spread_of(by_seed)
    differences, labels = scores
    by_class = metric == "balanced_accuracy"
    covariance = image_covariance(differences, labels if by_class else None)
    unseen = 0.0 if metric == "cross_entropy" else unseen_variance(labels, by_class=by_class)
    return spread_of(by_seed, covariance, unseen)


def mcnemar_of(runs: Sequence[ComparedRun], base: Sequence[ComparedRun], predictions: PredictionsOf) -> float | None:
    """McNemar's exact p-value of the first seed that both arms have; None where its predictions are not known."""
    pairs = paired(runs, base)[:1]
    if _image_scores(pairs, predictions, _hits) is None:
        return None
    correct, others = (_correct(predictions[run.arm, run.seed]) for run in pairs[0])
    return mcnemar(correct, others)


def with_adjusted_p_values(arms: Sequence[ArmSummary]) -> list[ArmSummary]:
    """The arms with the p-values of their differences corrected for their number, after Holm (1979)."""
    p_values = {arm.arm: arm.difference.p_value for arm in arms if arm.difference}
    known = {name: p_value for name, p_value in p_values.items() if p_value is not None}
    adjusted = dict(zip(known, holm(list(known.values())), strict=True))
    return [
        arm.model_copy(update={"difference": arm.difference.model_copy(update={"p_adjusted": adjusted[arm.arm]})})
        if arm.difference and arm.arm in adjusted
        else arm
        for arm in arms
    ]


def _image_scores(
    pairs: Sequence[Pair], predictions: PredictionsOf, score: Callable[[Predictions], np.ndarray]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Differences of what ``score`` has of each image, (seeds, images), and the labels; None unless all are known, of
    the same images."""
    found = [[predictions.get((run.arm, run.seed)) for run in pair] for pair in pairs]
    known = [scores for pair in found for scores in pair if scores is not None]
    if len(known) < 2 * len(pairs) or not known or any(not _same_images(known[0], other) for other in known[1:]):
        return None
    by_run = np.array([score(each) for each in known])
    return by_run[::2] - by_run[1::2], known[0].label


def _same_images(scores: Predictions, others: Predictions) -> bool:
    return np.array_equal(scores.id, others.id) and np.array_equal(scores.label, others.label)


def _correct(scores: Predictions) -> np.ndarray:
    return scores.prediction == scores.label


def _hits(scores: Predictions) -> np.ndarray:
    return _correct(scores).astype(np.int8)


def _losses(scores: Predictions) -> np.ndarray:
    return scores.loss


def _difference(spread: Spread, smallest_difference: float, max_seeds: int | None) -> Difference:
    headline = spread.interval()
    if max_seeds is not None and spread.n >= FIRST_LOOK:
        headline = decide(spread, max_seeds=max_seeds, smallest_difference=smallest_difference).interval
    ends = {"": headline, "seeds_": spread.over_seeds(), "images_": spread.over_images()}
    parts = {
        f"{part}{end}": None if interval is None else getattr(interval, end)
        for part, interval in ends.items()
        for end in ("low", "high")
    }
    seeds_needed = spread.seeds_needed(smallest_difference)
    return Difference(
        mean=spread.mean,
        n=spread.n,
        covers=spread.covers,
        p_value=p_value_of(spread, max_seeds),
        **parts,
        **({} if seeds_needed is None else {"seeds_needed": seeds_needed}),
    )
