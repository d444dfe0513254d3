"""Which metric a comparison is about, and whether a training learned anything at all by it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from pipeline.report.comparison import Metric
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


def score_of(result: TrainSummary, metric: Metric) -> float:
    """The metric of the network that a training ended with, from 0 to 1."""
    return result.final_accuracy if metric == "accuracy" else result.final_balanced_accuracy


def score_at(point: EvaluationPoint, metric: Metric) -> float:
    """The metric at one evaluation, from 0 to 1."""
    return point.accuracy if metric == "accuracy" else point.balanced_accuracy


def constant_score(metric: Metric, counts: Sequence[int]) -> float:
    """The metric of the best network that gives every image the same class, from 0 to 1.

    Of accuracy it is the share of the largest class; of balanced accuracy, one over the number of classes that have
    images.
    """
    return max(counts) / sum(counts) if metric == "accuracy" else 1 / sum(count > 0 for count in counts)


def standard_error(score: float, metric: Metric, counts: Sequence[int]) -> float:
    """Standard error over images of a metric, from 0 to 1: binomial, within each class for balanced accuracy.

    The recall of every class is taken to be ``score``, which is the largest error that a mean recall allows where the
    classes are of one size.
    """
    rows = np.asarray([count for count in counts if count], dtype=np.float64)
    images = rows.sum() if metric == "accuracy" else len(rows) ** 2 / np.sum(1 / rows)
    return float(np.sqrt(max(score * (1 - score), 0.0) / images))


def learned(score: float, metric: Metric, counts: Sequence[int]) -> bool:
    """Whether a network is better than the best that looks at no image, by more than chance over images allows.

    Parameters
    ----------
    score : the network's metric, from 0 to 1
    counts : images of each class in the split that it was evaluated on
    """
    _, z = quantiles(2, LEVEL)
    return score > constant_score(metric, counts) + z * standard_error(score, metric, counts)
