"""The scores of an evaluation against scikit-learn, and against the definition of the calibration error."""

import numpy as np
import pytest
import torch
from ranks import run_ranks
from sklearn import metrics as reference

from pipeline.distributed.worker import alone
from pipeline.training.checkpoint import CheckpointError
from pipeline.training.image_scores import image_scores
from pipeline.training.metrics import EvaluationCounts
from pipeline.training.progress import Progress

CLASSES, BINS = 5, 15


def split(rows, present, seed=0):
    """Logits and labels of the classes that are present, more than half of them of the first."""
    random = np.random.default_rng(seed)
    weights = np.ones(len(present))
    weights[0] += len(present)
    labels = random.choice(present, rows, p=weights / weights.sum())
    logits = random.normal(size=(rows, CLASSES)) + 1.5 * np.eye(CLASSES)[labels]
    return torch.from_numpy(logits).float(), torch.from_numpy(labels)


def evaluate(worker, logits, labels, batch=32):
    """The scores of this rank's part and all others."""
    counts = EvaluationCounts(CLASSES, worker.device)
    mine = slice(worker.rank * len(labels) // worker.world_size, (worker.rank + 1) * len(labels) // worker.world_size)
    for some, theirs in zip(logits[mine].split(batch), labels[mine].split(batch), strict=True):
        counts.update(theirs, image_scores(some, theirs))
    return counts.sum_over(worker, len(labels))


def calibration_error(logits, labels):
    """Guo et al. (2017), equations 1 to 3, as they are written: sets of images, bin after bin."""
    probabilities = logits.double().softmax(1)
    confidence, guess = probabilities.max(1)
    error = 0.0
    for number in range(1, BINS + 1):
        inside = (confidence > (number - 1) / BINS) & (confidence <= number / BINS)
        if inside.any():
            accuracy = (guess == labels)[inside].double().mean()
            error += inside.sum() / len(labels) * abs(accuracy - confidence[inside].mean())
    return float(error)


@pytest.mark.parametrize("present", [range(5), (0, 2, 3), (3,)], ids=["all classes", "some", "one class"])
@pytest.mark.filterwarnings("ignore::UserWarning:sklearn")  # a class that is predicted and not there
def test_scores_are_those_of_scikit_learn(present):
    logits, labels = split(1000, np.array(present))
    found, guess = evaluate(alone("cpu"), logits, labels), logits.argmax(1)
    assert (found.rows, found.correct) == (1000, int((guess == labels).sum()))
    assert found.accuracy == pytest.approx(reference.accuracy_score(labels, guess))
    assert found.balanced_accuracy == pytest.approx(reference.balanced_accuracy_score(labels, guess))
    assert found.macro_f1 == pytest.approx(reference.f1_score(labels, guess, average="macro"))
    probabilities = logits.double().softmax(1).numpy()
    assert found.loss == pytest.approx(reference.log_loss(labels, probabilities, labels=range(CLASSES)), rel=1e-5)
    recall = reference.recall_score(labels, guess, labels=range(CLASSES), average=None, zero_division=np.nan)
    assert found.recall == pytest.approx([None if np.isnan(share) else share for share in recall])
    assert [number for number, share in enumerate(found.recall) if share is None] == [
        number for number in range(CLASSES) if number not in present
    ]
    assert found.calibration_error == pytest.approx(calibration_error(logits, labels), rel=1e-6)
    assert found.balanced_accuracy != pytest.approx(found.accuracy) or len(present) == 1


def test_a_class_that_is_neither_there_nor_predicted_does_not_count_in_macro_f1():
    logits, labels = torch.eye(CLASSES)[[0, 0, 1, 1]] * 9, torch.tensor([0, 0, 1, 0])
    found = evaluate(alone("cpu"), logits, labels)
    assert found.macro_f1 == pytest.approx((0.8 + 2 / 3) / 2)
    assert found.recall == (pytest.approx(2 / 3), 1.0, None, None, None)


def test_calibration_at_the_edges_of_bins():
    """Confidences of 1/5, the least there is, and of 1: the third bin and the last. Half of them are right."""
    logits = torch.tensor([[0.0] * CLASSES] * 2 + [[1e4] + [0.0] * (CLASSES - 1)] * 2)
    found = evaluate(alone("cpu"), logits, torch.tensor([0, 1, 0, 1]))
    assert found.calibration_error == pytest.approx((2 * abs(0.5 - 0.2) + 2 * abs(0.5 - 1)) / 4, rel=1e-6)
    right = evaluate(alone("cpu"), logits[2:], torch.tensor([0, 0]))
    assert (right.calibration_error, right.loss, right.balanced_accuracy) == (0.0, 0.0, 1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_not_finite_have_no_loss_and_no_calibration_error(value):
    logits, labels = split(50, np.arange(5))
    logits[7] = value
    found = evaluate(alone("cpu"), logits, labels)
    assert (found.loss, found.calibration_error, found.rows) == (None, None, 50)
    assert 0 < found.balanced_accuracy < 1
    assert 0 < found.macro_f1 < 1


def test_ranks_together_find_what_one_finds():
    logits, labels = split(301, np.array((0, 2, 4)))
    alone_found = evaluate(alone("cpu"), logits, labels)
    for found in run_ranks(evaluate, 2, logits, labels):
        assert found.recall == alone_found.recall
        for name in ("rows", "correct", "accuracy", "loss", "balanced_accuracy", "macro_f1", "calibration_error"):
            assert getattr(found, name) == pytest.approx(getattr(alone_found, name), rel=1e-12), name


def test_progress_that_another_version_wrote_is_refused():
    point = {"step": 3, "epoch": 1.0, "accuracy": 0.5, "loss": 1.0}
    with pytest.raises(CheckpointError, match=r"another version of sparknorm .* in another folder \(`output`\)"):
        Progress.from_values({"step": 3, "curve": [point]})
    with pytest.raises(CheckpointError, match="another version"):
        Progress.from_values({"step": 3, "curve": [], "something": 1})
    scores = {"balanced_accuracy": 0.4, "macro_f1": 0.3, "calibration_error": None}
    values = {"step": 3, "curve": [point | scores], "recall": [0.5, None]}
    assert Progress.from_values(values).values() == Progress.from_values(values).values() | values
