"""Which arms need another seed."""

import numpy as np
import pytest

from pipeline.report.comparison import ComparedRun
from pipeline.report.differences import difference_of
from pipeline.report.significance import holm
from pipeline.report.until_certain import open_arms
from pipeline.training.predictions import Predictions

IMAGES, MAX_SEEDS = 4_000, 10


def study(accuracies, *, seeds=3, deviation=0.001, unhealthy=()):
    """Runs whose accuracies vary a little over seeds, and predictions that differ in their last images alone."""
    random = np.random.default_rng(0)
    runs, predictions = [], {}
    for arm, accuracy in accuracies.items():
        for seed in range(seeds):
            score = accuracy + deviation * random.standard_normal()
            wrong = np.arange(IMAGES) >= round(score * IMAGES)
            runs.append(
                ComparedRun.model_construct(
                    arm=arm, seed=seed, score=1 - wrong.mean(), learned=arm not in unhealthy, diverged=False
                )
            )
            predictions[arm, seed] = Predictions(
                id=np.arange(IMAGES), label=np.zeros(IMAGES, np.int32), prediction=wrong.astype(np.int32),
                confidence=np.ones(IMAGES, np.float32), loss=np.zeros(IMAGES, np.float32),
            )  # fmt: skip
    return runs, predictions


def still_open(accuracies, **options):
    return open_arms(*study(accuracies, **options), "accuracy", smallest_difference=0.005, max_seeds=MAX_SEEDS)


def test_a_clear_difference_needs_no_more_seeds():
    assert still_open({"none": 0.80, "batch": 0.90}) == []


def test_a_difference_within_the_noise_needs_more():
    assert still_open({"none": 0.80, "batch": 0.81}, deviation=0.01) == ["batch"]


def test_arms_that_are_equal_for_all_purposes_need_no_more():
    assert still_open({"none": 0.80, "batch": 0.80}, deviation=0.0002, seeds=5) == []


def test_an_arm_that_cannot_win_any_more_stops_though_the_baseline_is_near():
    found = still_open({"none": 0.80, "layer": 0.808, "batch": 0.90}, deviation=0.004)
    assert found == []


def test_an_arm_that_did_not_learn_needs_no_more():
    assert still_open({"none": 0.80, "batch": 0.81, "group": 0.81}, deviation=0.01, unhealthy={"group"}) == ["batch"]


def test_two_seeds_decide_nothing():
    assert still_open({"none": 0.80, "batch": 0.95}, seeds=2) == ["batch"]


@pytest.mark.parametrize("seeds", [3, 10])
def test_without_predictions_seeds_alone_decide(seeds):
    runs, _ = study({"none": 0.80, "batch": 0.90}, seeds=seeds)
    assert open_arms(runs, {}, "accuracy", smallest_difference=0.005, max_seeds=MAX_SEEDS) == []


def test_an_arm_that_stopped_with_fewer_seeds_is_compared_by_those_that_both_have():
    runs, predictions = study({"none": 0.80, "layer": 0.808, "batch": 0.90}, seeds=5, deviation=0.004)
    stopped = [run for run in runs if run.arm != "batch" or run.seed < 3]  # certain at the first look
    assert open_arms(stopped, predictions, "accuracy", 0.005, MAX_SEEDS) == []  # layer cannot win any more
    level = [run if run.arm != "batch" else run.model_copy(update={"score": 0.809}) for run in stopped]
    assert "layer" in open_arms(level, {}, "accuracy", 0.005, MAX_SEEDS)


def test_the_report_corrects_for_the_same_arms():
    """An arm that diverged with one seed has a difference over the others, which the report counts among the arms."""
    open_, certain = 0, 0
    for points in np.arange(0.5, 6, 0.1):
        scores = {"none": [0.8, 0.8, 0.8], "batch": [0.8 + 0.01 * points + by for by in (-0.002, 0.0, 0.0021)],
                  "group": [0.81, 0.79, 0.5]}  # fmt: skip
        runs = {
            arm: [
                ComparedRun.model_construct(
                    arm=arm, seed=seed, score=score, learned=True, diverged=(arm, seed) == ("group", 2)
                )
                for seed, score in enumerate(by_seed)
            ]
            for arm, by_seed in scores.items()
        }
        all_runs = [run for of_arm in runs.values() for run in of_arm]
        found = open_arms(all_runs, {}, "accuracy", smallest_difference=0.005, max_seeds=MAX_SEEDS)
        p_values = [
            difference_of(runs[arm], runs["none"], {}, "accuracy", 0.005, MAX_SEEDS).p_value
            for arm in ("batch", "group")
        ]
        assert (found == ["batch"]) == (holm(p_values)[0] > 0.05)
        open_, certain = open_ + bool(found), certain + (not found)
    assert open_ > 3
    assert certain > 3
