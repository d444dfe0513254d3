"""Confusion matrices of an arm, from the predictions files of its runs."""

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix
from small_comparisons import comparison_of

from pipeline.report.confusion import MOST_CLASSES, confusion_of
from pipeline.training import predictions
from pipeline.training.predictions import Predictions


@pytest.fixture
def runs(tmp_path):
    """Three runs of one arm, the last of which diverged, each with predictions of 200 images in 5 classes."""
    found = [run for run in comparison_of(seeds=3).runs if run.arm == "batch"]
    changed = []
    for run in found:
        random = np.random.default_rng(run.seed)
        label, prediction = random.integers(0, 4, (2, 200)).astype(np.int32)  # the last class has no images
        scores = np.zeros(200, np.float32)
        path = str(tmp_path / f"{run.seed}.parquet")
        predictions.write(path, Predictions(np.arange(200), label, prediction, scores, scores))
        changed.append(run.model_copy(update={"predictions": path, "diverged": run.seed == 2}))
    return changed


def expected(runs):
    files = [predictions.read(run.predictions) for run in runs]
    return sum(confusion_matrix(file.label, file.prediction, labels=range(5)) for file in files).tolist()


def test_it_is_the_sum_over_the_runs_that_did_not_diverge_or_over_all(runs):
    assert [list(row) for row in confusion_of(runs, 5)] == expected(runs[:2])
    assert [list(row) for row in confusion_of(runs[2:], 5)] == expected(runs[2:])


def test_there_is_none_for_many_classes_or_without_predictions(runs, tmp_path, caplog):
    assert confusion_of(runs, MOST_CLASSES + 1) is None
    assert len(confusion_of(runs, MOST_CLASSES)) == MOST_CLASSES
    assert confusion_of([runs[0], runs[1].model_copy(update={"predictions": None})], 5) is None
    (tmp_path / "1.parquet").unlink()
    assert confusion_of(runs, 5) is None
    assert "1.parquet is gone: there is no confusion matrix of the arm batch" in caplog.text
