"""The numbers of a comparison against ones computed by hand."""

import math

import numpy as np
import pytest

from pipeline.report import statistics
from pipeline.report.comparison import ArmSummary, Difference, StudyRun
from pipeline.training.result import EvaluationPoint

# Student's t of 0.975, from a printed table.
T_975 = {1: 12.706204736, 6: 2.446911851}


def run(arm, seed, accuracies, *, speed=100.0, diverged=False, rate=0.1, loss=1.0):
    scores = {"loss": loss, "balanced_accuracy": accuracies[-1] - 0.1, "macro_f1": 0.4, "calibration_error": None}
    curve = [EvaluationPoint(step=10 * n, epoch=n, accuracy=a, **scores) for n, a in enumerate(accuracies, start=1)]
    return StudyRun(
        arm=arm, values={"model.norm": arm}, tuned={"train.learning_rate": rate}, learning_rate=rate, global_batch=32,
        seed=seed, best_accuracy=max(accuracies), final_accuracy=accuracies[-1], recall=(0.25, None),
        **{f"final_{score}": value for score, value in scores.items()}, steps=10 * len(accuracies),
        images_per_second=speed, data_wait_share=None, diverged=diverged, curve=tuple(curve),
        train_loss=(1.0,) * len(curve), train_seconds=tuple(2.0 * (n + 1) for n in range(len(curve))),
        checkpoint="", world_size=1, attempts=1, ranks=(), run_id="",
    )  # fmt: skip


BASE = [run("none", 0, [0.5, 0.6, 0.7]), run("none", 1, [0.5, 0.6, 0.55])]
BATCH = [run("batch", 0, [0.6, 0.75, 0.8], speed=80.0), run("batch", 1, [0.65, 0.7, 0.7], speed=90.0)]


def summarized(base, runs, search=(), **options):
    runs = statistics.with_targets([*base, *runs], "none", options.get("target"))
    of_base, of_arm = [r for r in runs if r.arm == "none"], [r for r in runs if r.arm != "none"]
    return statistics.summary_of(of_arm, of_base, list(search), chance=0.1)


def test_the_target_is_the_best_of_the_baseline_with_the_same_seed():
    compared = statistics.with_targets([*BASE, *BATCH], "none", None)
    assert [r.target for r in compared] == [0.7, 0.6, 0.7, 0.6]
    assert [r.steps_to_target for r in compared] == [30, 20, 20, 10]
    assert [r.images_to_target for r in compared] == [960, 640, 640, 320]
    assert [r.seconds_to_target for r in compared] == [6.0, 4.0, 4.0, 2.0]
    assert [StudyRun(**r.model_dump(include=set(StudyRun.model_fields) - {"gradient_norms"})) for r in compared] == [
        *BASE, *BATCH,
    ]  # fmt: skip


def test_a_target_of_the_users_choice_may_never_be_reached():
    compared = statistics.with_targets([*BASE, *BATCH], "none", 0.75)
    assert [r.steps_to_target for r in compared] == [None, None, 20, None]
    arm = statistics.summary_of(compared[2:], compared[:2], [], chance=0.1)
    assert (arm.reached_target, arm.steps_to_target_mean, arm.steps_ratio) == (1, 20, None)


def test_paired_differences_have_students_interval():
    rng = np.random.default_rng(0)
    base, accuracies = rng.normal(0.6, 0.05, 7), rng.normal(0.65, 0.05, 7)
    difference = statistics.paired_difference(
        [run("batch", seed, [float(a)]) for seed, a in enumerate(accuracies)],
        [run("none", seed, [float(a)]) for seed, a in enumerate(base)][::-1],
    )
    differences = accuracies - base
    mean, half = differences.mean(), T_975[6] * differences.std(ddof=1) / math.sqrt(7)
    assert difference.mean == pytest.approx(mean, abs=1e-15)
    assert (difference.low, difference.high) == pytest.approx((mean - half, mean + half), abs=1e-9)
    assert difference.n == 7


@pytest.mark.filterwarnings("error")
def test_differences_that_hardly_vary_have_a_short_interval():
    difference = statistics.paired_difference(BATCH, [run("none", 0, [0.7]), run("none", 1, [0.6])])
    assert (difference.low, difference.high) == pytest.approx((difference.mean, difference.mean), abs=1e-12)
    assert difference.mean == pytest.approx(0.1)


def test_one_seed_says_nothing_about_chance():
    assert statistics.paired_difference(BATCH[:1], BASE[:1]) == Difference(
        mean=BATCH[0].best_accuracy - BASE[0].best_accuracy, low=None, high=None, n=1
    )
    assert summarized(BASE[:1], BATCH[:1]).best_accuracy_std is None


def test_scores_are_means_and_deviations_of_the_last_evaluations():
    arm = summarized(BASE, [run("batch", 0, [0.7], loss=0.5), run("batch", 1, [0.5], loss=0.75)])
    assert (arm.final_balanced_accuracy_mean, arm.final_balanced_accuracy_std) == pytest.approx((0.5, math.sqrt(0.02)))
    assert (arm.final_macro_f1_mean, arm.final_macro_f1_std) == (0.4, 0.0)
    assert (arm.final_loss_mean, arm.final_loss_std) == pytest.approx((0.625, math.sqrt(0.03125)))
    assert (arm.final_calibration_error_mean, arm.final_calibration_error_std) == (None, None)


def test_a_loss_that_is_not_finite_is_left_out_of_the_mean():
    arm = summarized(BASE, [run("batch", 0, [0.7], loss=0.5), run("batch", 1, [0.1], loss=None, diverged=True)])
    assert (arm.final_loss_mean, arm.final_loss_std) == (0.5, None)


def test_ratios_and_overhead_are_against_the_baseline():
    arm = summarized(BASE, BATCH)
    assert arm.steps_ratio == (30 + 20) / (20 + 10)
    assert arm.seconds_ratio == (6 + 4) / (4 + 2)
    assert arm.overhead == pytest.approx(np.median([100 / 80, 100 / 90]) - 1)


def test_the_baseline_is_not_compared_with_itself():
    runs = statistics.with_targets(BASE, "none", None)
    arm = statistics.summary_of(runs, runs, [], chance=0.1)
    assert not {"difference", "steps_ratio", "seconds_ratio", "overhead"} & arm.model_dump(exclude_unset=True).keys()


@pytest.mark.parametrize(
    "runs", [[run("batch", 0, [0.1], diverged=True, speed=None), run("batch", 1, [0.1], speed=None)]]
)
def test_an_arm_that_diverged_is_counted_and_its_unknowns_are_none(runs):
    arm = summarized(BASE, runs)
    assert (arm.diverged, arm.reached_target) == (1, 0)
    assert (arm.steps_to_target_mean, arm.images_per_second_mean, arm.steps_ratio, arm.overhead) == (None,) * 4
    assert all(math.isfinite(value) for _, value in arm if isinstance(value, float))


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
    assert statistics.stable_rates(trials, chance=0.1) == (highest, is_bound)


def chosen(name, rate, diverged=0):
    return ArmSummary.model_construct(arm=name, tuned={"train.learning_rate": rate}, diverged=diverged, n=3)


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
