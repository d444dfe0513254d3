"""Which classes the runs of an arm took for which, counted from the predictions that each has kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np

from pipeline.report.comparison import StudyRun
from pipeline.training import predictions

log = logging.getLogger(__name__)

# A matrix of more classes is no picture that anybody reads.
MOST_CLASSES = 30


def confusion_of(runs: Sequence[StudyRun], classes: int) -> tuple[tuple[int, ...], ...] | None:
    """Images by label (rows) and prediction (columns), summed over the runs that did not diverge, or over all.

    Returns
    -------
    None for more than `MOST_CLASSES` classes, or where the predictions of a run are not there any more.
    """
    if classes > MOST_CLASSES:
        return None
    total = np.zeros((classes, classes), np.int64)
    for run in [run for run in runs if not run.diverged] or runs:
        try:
            if run.predictions is None:
                return None
            found = predictions.read(run.predictions)
        except FileNotFoundError:
            log.warning("%s is gone: there is no confusion matrix of the arm %s", run.predictions, run.arm)
            return None
        pairs = found.label.astype(np.int64) * classes + found.prediction
        total += np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)
    return tuple(tuple(row) for row in total.tolist())
