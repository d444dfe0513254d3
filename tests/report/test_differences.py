"""Differences of arms from the baseline, from their runs and predictions."""

import math
from dataclasses import replace

import numpy as np
import pytest
from small_comparisons import JUDGE, comparison_of, predictions_of

from pipeline.report.comparison import ComparedRun
from pipeline.report.differences import difference_of, mcnemar_of, with_adjusted_p_values
from pipeline.report.intervals import image_covariance, spread_of
from pipeline.training.predictions import Predictions

# Student's t of 0.975 for six degrees of freedom, from a printed table.
T_975 = 2.446911851
COMPARISON = comparison_of(seeds=7)
RUNS = {arm: [run for run in COMPARISON.runs if run.arm == arm] for arm in ("none", "batch")}
PREDICTIONS = {(run.arm, run.seed): predictions_of(run) for run in COMPARISON.runs}


def between(base, runs, predictions=PREDICTIONS, metric="accuracy"):
    return difference_of(runs, base, predictions, metric, JUDGE.smallest_difference)


def test_pairs_are_of_one_seed_and_their_interval_is_students_where_no_image_is_known():
    difference = between(RUNS["none"][::-1], RUNS["batch"], {})
    by_seed = np.subtract(*([run.final_accuracy for run in RUNS[arm]] for arm in ("batch", "none")))
    mean, half = by_seed.mean(), T_975 * by_seed.std(ddof=1) / math.sqrt(7)
    assert (difference.mean, difference.n, difference.covers) == (pytest.approx(mean), 7, "seeds")
    assert (difference.low, difference.high) == pytest.approx((mean - half, mean + half), abs=1e-9)
    assert (difference.seeds_low, difference.seeds_high) == (difference.low, difference.high)
    assert (difference.images_low, difference.images_high) == (None, None)


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy"])
def test_predictions_widen_the_interval_by_what_images_change(metric):
    difference = between(RUNS["none"], RUNS["batch"], metric=metric)
    right = {key: found.prediction == found.label for key, found in PREDICTIONS.items()}
    values = np.array([right["batch", seed].astype(int) - right["none", seed] for seed in range(7)])
    labels = PREDICTIONS["none", 0].label if metric == "balanced_accuracy" else None
    pairs = zip(RUNS["batch"], RUNS["none"], strict=True)
    by_seed = np.array([run.score - base.score for run, base in pairs])
    rows = [values.shape[1]] if labels is None else [int((labels == label).sum()) for label in set(labels.tolist())]
    unseen = sum(1 / count**2 for count in rows) / len(rows) ** 2
    spread = spread_of(by_seed, image_covariance(values, labels), unseen)
    assert difference.covers == "seeds and images"
    assert (difference.low, difference.high) == pytest.approx(spread.interval())
    assert (difference.images_low, difference.images_high) == pytest.approx(spread.over_images())
    assert difference.high - difference.low >= max(
        difference.seeds_high - difference.seeds_low, difference.images_high - difference.images_low
    )
    assert difference.p_value == pytest.approx(spread.p_value())


def test_images_of_a_cross_entropy_are_their_losses():
    random = np.random.default_rng(0)
    found = {
        key: replace(each, loss=random.exponential(0.3 + 0.1 * (key[0] == "none"), len(each)).astype(np.float32))
        for key, each in PREDICTIONS.items()
    }
    runs = {arm: [run.model_copy(update={"score": float(found[arm, run.seed].loss.mean())}) for run in RUNS[arm]]
            for arm in RUNS}  # fmt: skip
    difference = between(runs["none"], runs["batch"], found, metric="cross_entropy")
    losses = np.array([found["batch", seed].loss - found["none", seed].loss for seed in range(7)], np.float64)
    spread = spread_of(losses.mean(axis=1), image_covariance(losses))
    assert difference.covers == "seeds and images"
    assert difference.mean == pytest.approx(losses.mean(), abs=1e-7)
    assert (difference.low, difference.high) == pytest.approx(spread.interval(), abs=1e-6)
    assert -0.13 < difference.mean < -0.07  # less is better


@pytest.mark.parametrize("gone", ["a run", "another image", "another label"])
def test_predictions_that_do_not_fit_leave_seeds_alone(gone):
    found = dict(PREDICTIONS)
    last = found.pop(("batch", 6))
    if gone == "another image":
        found["batch", 6] = type(last)(last.id + 1, last.label, last.prediction, last.confidence, last.loss)
    if gone == "another label":
        found["batch", 6] = type(last)(last.id, last.label[::-1], last.prediction, last.confidence, last.loss)
    assert between(RUNS["none"], RUNS["batch"], found).covers == "seeds"


def test_one_seed_is_over_images_alone():
    difference = between(RUNS["none"][:1], RUNS["batch"][:1])
    assert (difference.covers, difference.n, difference.seeds_low) == ("images", 1, None)
    assert (difference.low, difference.high) == (difference.images_low, difference.images_high)
    nothing = between(RUNS["none"][:1], RUNS["batch"][:1], {})
    assert (nothing.covers, nothing.low, nothing.p_value) == ("nothing", None, None)


def test_seeds_with_a_run_that_fell_are_left_out():
    fallen = [run.model_copy(update={"diverged": run.seed == 3, "learned": run.seed != 5}) for run in RUNS["none"]]
    assert between(fallen, RUNS["batch"]).n == 5
    assert between([run.model_copy(update={"diverged": True}) for run in fallen], RUNS["batch"]) is None


def test_mcnemar_is_of_the_first_seed():
    right = [PREDICTIONS[arm, 0].prediction == PREDICTIONS[arm, 0].label for arm in ("batch", "none")]
    ahead, behind = np.sum(right[0] & ~right[1]), np.sum(right[1] & ~right[0])
    assert ahead > behind > 0
    p_value = mcnemar_of(RUNS["batch"], RUNS["none"], PREDICTIONS)
    chi = math.erfc((ahead - behind - 1) / math.sqrt(2 * (ahead + behind)))  # with a continuity correction
    assert p_value == pytest.approx(chi, rel=0.5)
    assert COMPARISON.arms[1].difference.mcnemar_p == p_value
    assert mcnemar_of(RUNS["batch"], RUNS["none"], {}) is None


def test_p_values_are_corrected_for_the_number_of_arms():
    arms = comparison_of({"model.norm": ["none", "batch", "group", "layer"]}).arms
    p_values = [arm.difference.p_value for arm in arms[1:]]
    adjusted = [arm.difference.p_adjusted for arm in with_adjusted_p_values(arms)[1:]]
    assert adjusted == [arm.difference.p_adjusted for arm in arms[1:]]
    assert min(adjusted) == pytest.approx(3 * min(p_values))
    assert max(adjusted) >= max(p_values)


def runs_with(wrong_of_each, images):
    """Runs of one arm, a seed for each set of images that are wrong, and their predictions."""
    found, runs = {}, []
    for seed, wrong in enumerate(wrong_of_each):
        prediction = np.zeros(images, np.int32)
        prediction[list(wrong)] = 1
        found[seed] = Predictions(
            id=np.arange(images), label=np.zeros(images, np.int32), prediction=prediction,
            confidence=np.ones(images, np.float32), loss=np.zeros(images, np.float32),
        )  # fmt: skip
        runs.append((seed, 1 - len(wrong) / images))
    return runs, found


def difference_between(arms, images):
    runs, predictions = {}, {}
    for arm, wrong in arms.items():
        of_arm, found = runs_with(wrong, images)
        runs[arm] = [
            ComparedRun.model_construct(arm=arm, seed=seed, score=score, learned=True, diverged=False)
            for seed, score in of_arm
        ]
        predictions |= {(arm, seed): each for seed, each in found.items()}
    return between(runs["none"], runs["batch"], predictions)


@pytest.mark.parametrize(
    ("wrong", "mean"),
    [
        pytest.param({"none": [[], [], []], "batch": [[], [], []]}, 0, id="no error anywhere"),
        # McNemar's test of the three images together has a p-value of 0.25.
        pytest.param({"none": [[0], [1], [2]], "batch": [[], [], []]}, 1 / 30, id="another image for each seed"),
        pytest.param({"none": [[0], [0], [0]], "batch": [[], [], []]}, 1 / 30, id="the same image for each seed"),
    ],
)
def test_few_images_that_agree_by_chance_make_nothing_certain(wrong, mean):
    difference = difference_between(wrong, 30)
    assert difference.mean == pytest.approx(mean)
    assert difference.high - difference.low > 2 * 1.95 / 30
    assert difference.p_value > 0.05


def test_many_images_that_agree_do():
    difference = difference_between({"none": [[], [], []], "batch": [[], [], []]}, 4_000)
    assert -0.0005 < difference.low < 0 < difference.high < 0.0005
