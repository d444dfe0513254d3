"""The numbers of a comparison against ones computed by hand or by scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from pipeline.report import statistics


def run(arm, seed, accuracies, *, speed=100.0, diverged=False, rate=0.1):
    curve = [{"step": 10 * (n + 1), "epoch": n + 1, "accuracy": a, "loss": 1.0} for n, a in enumerate(accuracies)]
    return {
        "arm": arm, "values": {"model.norm": arm}, "tuned": {"train.learning_rate": rate}, "learning_rate": rate,
        "global_batch": 32, "seed": seed, "best_accuracy": max(accuracies), "final_accuracy": accuracies[-1],
        "steps": 10 * len(accuracies), "images_per_second": speed, "diverged": diverged, "curve": curve,
        "train_loss": [1.0] * len(curve), "train_seconds": [2.0 * (n + 1) for n in range(len(curve))],
    }  # fmt: skip


BASE = [run("none", 0, [0.5, 0.6, 0.7]), run("none", 1, [0.5, 0.6, 0.55])]
BATCH = [run("batch", 0, [0.6, 0.75, 0.8], speed=80.0), run("batch", 1, [0.65, 0.7, 0.7], speed=90.0)]


def summarized(base, runs, search=(), **options):
    runs = statistics.with_targets([*base, *runs], "none", options.get("target"))
    of_base, of_arm = [r for r in runs if r["arm"] == "none"], [r for r in runs if r["arm"] != "none"]
    return statistics.summary_of(of_arm, of_base, list(search), chance=0.1)


def test_the_target_is_the_best_of_the_baseline_with_the_same_seed():
    found = statistics.with_targets([*BASE, *BATCH], "none", None)
    assert [r["target"] for r in found] == [0.7, 0.6, 0.7, 0.6]
    assert [r["steps_to_target"] for r in found] == [30, 20, 20, 10]
    assert [r["images_to_target"] for r in found] == [960, 640, 640, 320]
    assert [r["seconds_to_target"] for r in found] == [6.0, 4.0, 4.0, 2.0]


def test_a_target_of_the_users_choice_may_never_be_reached():
    found = statistics.with_targets([*BASE, *BATCH], "none", 0.75)
    assert [r["steps_to_target"] for r in found] == [None, None, 20, None]
    arm = statistics.summary_of(found[2:], found[:2], [], chance=0.1)
    assert (arm["reached_target"], arm["steps_to_target_mean"], arm["steps_ratio"]) == (1, 20, None)


def test_paired_differences_have_students_interval():
    rng = np.random.default_rng(0)
    base = [run("none", seed, [float(a)]) for seed, a in enumerate(rng.normal(0.6, 0.05, 7))]
    arm = [run("batch", seed, [float(a)]) for seed, a in enumerate(rng.normal(0.65, 0.05, 7))]
    found = statistics.paired_difference(arm, base[::-1], lambda r: r["best_accuracy"])
    reference = stats.ttest_rel([r["best_accuracy"] for r in arm], [r["best_accuracy"] for r in base])
    interval = reference.confidence_interval(0.95)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), abs=1e-12)
    assert found["n"] == 7


def test_one_seed_says_nothing_about_chance():
    assert statistics.paired_difference(BATCH[:1], BASE[:1], lambda r: r["best_accuracy"]) == {
        "mean": pytest.approx(0.1), "low": None, "high": None, "n": 1,
    }  # fmt: skip
    assert summarized(BASE[:1], BATCH[:1])["best_accuracy_std"] is None


def test_ratios_and_overhead_are_against_the_baseline():
    arm = summarized(BASE, BATCH)
    assert arm["steps_ratio"] == (30 + 20) / (20 + 10)
    assert arm["seconds_ratio"] == (6 + 4) / (4 + 2)
    assert arm["overhead"] == pytest.approx(np.median([100 / 80, 100 / 90]) - 1)


@pytest.mark.parametrize(
    "runs", [[run("batch", 0, [0.1], diverged=True, speed=None), run("batch", 1, [0.1], speed=None)]]
)
def test_an_arm_that_diverged_is_counted_and_its_unknowns_are_none(runs):
    arm = summarized(BASE, runs)
    assert (arm["diverged"], arm["reached_target"]) == (1, 0)
    assert [arm[key] for key in ("steps_to_target_mean", "images_per_second_mean", "steps_ratio", "overhead")] == [
        None
    ] * 4
    assert all(value is None or not isinstance(value, float) or math.isfinite(value) for value in arm.values())


def rates(*results):
    return [run("batch", 0, [accuracy], rate=rate, diverged=diverged) for rate, accuracy, diverged in results]


@pytest.mark.parametrize(
    ("trials", "highest", "is_bound"),
    [
        (rates((0.1, 0.8, False), (1.0, 0.8, False), (10.0, 0.1, True)), 1.0, False),
        (rates((0.1, 0.8, False), (1.0, 0.7, False)), 1.0, True),
        (rates((0.1, 0.8, False), (1.0, 0.1, False), (10.0, 0.7, False)), 0.1, False),  # collapsed: a finite loss
        (rates((0.1, 0.1, True), (1.0, 0.1, True)), None, False),
        (rates((0.1, 0.8, False)), None, False),
    ],
    ids=["diverges", "all stable", "collapses in between", "none stable", "one rate"],
)
def test_the_highest_stable_rate(trials, highest, is_bound):
    assert statistics.stable_rates(trials, chance=0.1) == {
        "highest_stable_rate": highest, "highest_stable_is_bound": is_bound,
    }  # fmt: skip


def chosen(name, rate, diverged=0):
    return {"arm": name, "tuned": {"train.learning_rate": rate}, "diverged": diverged, "n": 3}


def test_a_choice_at_the_edge_of_the_grid_is_said():
    grid, tune = {"train.learning_rate": (0.1, 0.2, 0.5)}, ["train.learning_rate"]
    assert statistics.warnings_of([chosen("none", 0.1), chosen("batch", 0.5)], grid, tune) == [
        "The best train.learning_rate of none is the lowest of the grid, 0.1: a better one may lie beyond it.",
        "The best train.learning_rate of batch is the highest of the grid, 0.5: a better one may lie beyond it.",
    ]
    (text,) = statistics.warnings_of([chosen(name, 0.5) for name in "abcdef"], grid, tune)
    assert text.startswith("The best train.learning_rate of a; b; c and 3 other arms is the highest")
    assert statistics.warnings_of([chosen("none", 0.2)], grid, tune) == []
    assert statistics.warnings_of([chosen("none", 0.2)], {}, []) == []


def test_a_baseline_that_diverged_is_said():
    assert statistics.warnings_of([chosen("none", 0.2, diverged=1), chosen("batch", 0.2)], {}, []) == [
        "1 of 3 runs of the baseline diverged: differences from it include them."
    ]


def test_what_was_not_measured_is_what_did_not_vary():
    grid = {"model.norm": ("none", "batch"), "train.batch_size": (32, 64)}
    assert statistics.not_measured(grid, 1, gradient_norms=True) == [
        "other learning rates", "other depths", "other networks", "other numbers of workers",
        "how much results vary with the seed (compare.seeds has one)",
    ]  # fmt: skip
