"""Which metric a comparison or a search is about, what a training has of it, and whether it learned anything by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.report.comparison import Metric, Objective
from pipeline.report.intervals import LEVEL, quantiles
from pipeline.training.result import EvaluationPoint, TrainSummary

# The largest class of a balanced split has its even share; from this multiple of it on, accuracy misleads.
_IMBALANCE = 2


def metric_for(choice: Literal["auto", "accuracy", "balanced_accuracy"], counts: Sequence[int]) -> Metric:
    """The metric that a comparison is about.

    Parameters
    ----------
    choice : ``auto`` is balanced accuracy where the largest class has more than twice its even share, else accuracy
    counts : images of each class in the split that the arms are evaluated on
    """
    if choice != "auto":
        return choice
    return "balanced_accuracy" if max(counts) * len(counts) > _IMBALANCE * sum(counts) else "accuracy"


def objective_for(
    choice: Literal["auto", "accuracy", "balanced_accuracy", "cross_entropy"], counts: Sequence[int]
) -> Objective:
    """What a search is about; see `metric_for`."""
    return choice if choice == "cross_entropy" else metric_for(choice, counts)


def score_of(result: TrainSummary, metric: Objective) -> float:
    """The metric of the network that a training ended with, from 0 to 1; a cross-entropy in nats, 0 to infinity."""
    if metric == "cross_entropy":
        return math.inf if result.final_loss is None else result.final_loss
    return result.final_accuracy if metric == "accuracy" else result.final_balanced_accuracy


def score_at(point: EvaluationPoint, metric: Objective) -> float:
    """The metric at one evaluation; see `score_of`."""
    if metric == "cross_entropy":
        return math.inf if point.loss is None else point.loss
    return point.accuracy if metric == "accuracy" else point.balanced_accuracy


def goodness(score: float, metric: Objective) -> float:
    """A number that is the higher, the better a score is: the score itself, or the cross-entropy with a minus."""
    return -score if metric == "cross_entropy" else score


def constant_score(metric: Objective, counts: Sequence[int]) -> float:
    """The metric of the best network that gives every image the same answer; see `score_of`.

    Of accuracy it is the share of the largest class; of balanced accuracy, one over the number of classes that have
    images; of cross-entropy, the entropy of the classes.
    """
    if metric == "cross_entropy":
        return -sum(count / sum(counts) * math.log(count / sum(counts)) for count in counts if count)
    return max(counts) / sum(counts) if metric == "accuracy" else 1 / sum(count > 0 for count in counts)


def beats_constant(hits: np.ndarray, counts: np.ndarray, weights: np.ndarray) -> bool:
    """Whether a network is right more often than the best that gives every image the same class, beyond chance.

    This is what it means everywhere that a training has learned. The two are compared image by image: the mean of
    weight x (right - of the class that weighs most) exceeds 0 by the normal quantile of a two-sided 95% interval, in
    standard errors over images. How many images of each class are right is all that it takes.

    Parameters
    ----------
    hits : float (classes,), images of each class that the network was right of
    counts : int (classes,), images of each class
    weights : float (classes,), how much an image of each class counts: alike for accuracy, one over the images of its
        class for balanced accuracy, and in a search what it counts in the training
    """
    rows = counts.sum()
    if rows < 2:
        return False
    # Of the class that the constant network names the difference is right - 1, of every other it is right.
    ahead = np.where(np.arange(len(counts)) == np.argmax(weights * counts), hits - counts, hits)
    mean = float((weights * ahead).sum() / rows)
    variance = float(((weights**2 * np.abs(ahead)).sum() - rows * mean**2) / (rows - 1))
    _, z = quantiles(2, LEVEL)
    return bool(mean > z * np.sqrt(max(variance, 0.0) / rows))


def learned(recall: Sequence[float | None], metric: Objective, counts: Sequence[int]) -> bool:
    """Whether a network `beats_constant` by the metric of a comparison.

    Parameters
    ----------
    metric : of a cross-entropy, which says nothing of right and wrong, the one that ``auto`` chooses
    recall : of each class, from 0 to 1; None where it has no images
    counts : images of each class in the split that it was evaluated on
    """
    metric = metric_for("auto", counts) if metric == "cross_entropy" else metric
    rows = np.asarray(counts, dtype=np.float64)
    hits = rows * [share or 0.0 for share in recall]
    weights = np.ones(len(rows)) if metric == "accuracy" else 1 / np.maximum(rows, 1)
    return beats_constant(hits, rows, weights)
