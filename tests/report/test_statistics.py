"""The numbers of a comparison against ones computed by hand."""

import math

import numpy as np
import pytest

from pipeline.report import statistics
from pipeline.report.comparison import ArmSummary, SearchTrial, StudyRun
from pipeline.training.result import EvaluationPoint

JUDGE = statistics.Judge("accuracy", (100,) * 10, (100,) * 10, smallest_difference=0.005)


def run(arm, seed, accuracies, *, speed=100.0, diverged=False, rate=0.1, loss=1.0):
    scores = {"loss": loss, "balanced_accuracy": accuracies[-1] - 0.1, "macro_f1": 0.4, "calibration_error": None}
    curve = [EvaluationPoint(step=10 * n, epoch=n, accuracy=a, **scores) for n, a in enumerate(accuracies, start=1)]
    return StudyRun(
        arm=arm, values={"model.norm": arm}, tuned={"train.learning_rate": rate}, learning_rate=rate, global_batch=32,
        seed=seed, best_accuracy=max(accuracies), final_accuracy=accuracies[-1], recall=(accuracies[-1],) * 10,
        **{f"final_{score}": value for score, value in scores.items()}, steps=10 * len(accuracies),
        images_per_second=speed, data_wait_share=None, diverged=diverged, curve=tuple(curve),
        train_loss=(1.0,) * len(curve), train_seconds=tuple(2.0 * (n + 1) for n in range(len(curve))),
        checkpoint="", world_size=1, attempts=1, ranks=(), run_id="",
    )  # fmt: skip


BASE = [run("none", 0, [0.5, 0.6, 0.7]), run("none", 1, [0.5, 0.6, 0.55])]
BATCH = [run("batch", 0, [0.6, 0.75, 0.8], speed=80.0), run("batch", 1, [0.65, 0.7, 0.7], speed=90.0)]


def summarized(base, runs, search=(), **options):
    runs = statistics.with_targets([*base, *runs], "none", options.get("target"), JUDGE)
    return statistics.summaries_of(runs, search, {}, JUDGE)[1]


def test_the_target_is_the_end_of_the_baseline_with_the_same_seed_and_not_its_best():
    compared = statistics.with_targets([*BASE, *BATCH], "none", None, JUDGE)
    assert [r.target for r in compared] == [0.7, 0.55, 0.7, 0.55]
    assert [r.score for r in compared] == [0.7, 0.55, 0.8, 0.7]
    assert all(r.learned for r in compared)
    assert [r.steps_to_target for r in compared] == [30, 20, 20, 10]
    assert [r.images_to_target for r in compared] == [960, 640, 640, 320]
    assert [r.seconds_to_target for r in compared] == [6.0, 4.0, 4.0, 2.0]
    assert [StudyRun(**r.model_dump(include=set(StudyRun.model_fields) - {"gradient_norms"})) for r in compared] == [
        *BASE, *BATCH,
    ]  # fmt: skip


def test_the_metric_of_the_target_and_of_the_scores_is_the_studys():
    judge = JUDGE._replace(metric="balanced_accuracy")  # here it is the last accuracy less 0.1, at every evaluation
    compared = statistics.with_targets([*BASE, *BATCH], "none", None, judge)
    assert [r.score for r in compared] == pytest.approx([0.6, 0.45, 0.7, 0.6])
    assert [r.steps_to_target for r in compared] == [10] * 4
    assert statistics.summaries_of(compared, [], {}, judge)[1].difference.mean == pytest.approx(0.125)


@pytest.mark.parametrize("fallen", [{"diverged": True}, {}])
def test_a_baseline_that_fell_is_no_target(fallen):
    base = [run("none", 0, [0.5, 0.1], **fallen), BASE[1]]
    compared = statistics.with_targets([*base, *BATCH], "none", None, JUDGE)
    assert [r.steps_to_target for r in compared] == [None, 20, None, 10]
    assert [r.target for r in compared] == [None, 0.55, None, 0.55]
    assert [r.steps_to_target for r in statistics.with_targets([*base, *BATCH], "none", 0.5, JUDGE)] == [10] * 4
    arm = statistics.summaries_of(compared, [], {}, JUDGE)[1]
    assert (arm.had_target, arm.reached_target) == (1, 1)


def test_a_target_of_the_users_choice_may_never_be_reached():
    compared = statistics.with_targets([*BASE, *BATCH], "none", 0.75, JUDGE)
    assert [r.steps_to_target for r in compared] == [None, None, 20, None]
    arm = statistics.summaries_of(compared, [], {}, JUDGE)[1]
    assert (arm.reached_target, arm.steps_to_target_mean, arm.steps_ratio) == (1, 20, None)


def test_runs_that_did_not_learn_are_counted_and_left_out_of_the_difference():
    arm = summarized(BASE, [BATCH[0], run("batch", 1, [0.5, 0.12])])  # 0.12 of 1,000 images is no more than a tenth
    assert (arm.n, arm.diverged, arm.not_learned, arm.healthy, arm.grade) == (2, 0, 1, 1, "did not learn")
    assert (arm.difference.n, arm.difference.mean) == (1, pytest.approx(0.1))
    assert (arm.score_mean, arm.score_std) == (0.8, None)
    assert arm.final_accuracy_mean == pytest.approx(0.46)


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
    assert (arm.overhead_low, arm.overhead_high) == pytest.approx((100 / 90 - 1, 100 / 80 - 1))
    single = summarized(BASE[:1], BATCH[:1])
    assert (single.overhead, single.overhead_low) == (pytest.approx(0.25), None)


def test_speeds_are_those_of_the_runs_that_count():
    """One that does not learn may be fast: the overhead is of sound pairs, and so is what stands beside it."""
    base = [*BASE, run("none", 2, [0.1], speed=500.0)]
    runs = statistics.with_targets([*base, *BATCH, run("batch", 2, [0.7], speed=80.0)], "none", None, JUDGE)
    assert statistics.summaries_of(runs, [], {}, JUDGE)[0].images_per_second_mean == 100.0


def test_the_baseline_is_not_compared_with_itself():
    runs = statistics.with_targets(BASE, "none", None, JUDGE)
    (arm,) = statistics.summaries_of(runs, [], {}, JUDGE)
    assert (
        not {"grade", "difference", "steps_ratio", "seconds_ratio", "overhead"}
        & arm.model_dump(exclude_unset=True).keys()
    )


@pytest.mark.parametrize(
    "runs", [[run("batch", 0, [0.1], diverged=True, speed=None), run("batch", 1, [0.1], speed=None)]]
)
def test_an_arm_that_diverged_is_counted_and_its_unknowns_are_none(runs):
    arm = summarized(BASE, runs)
    assert (arm.diverged, arm.not_learned, arm.reached_target) == (1, 1, 0)
    assert (arm.grade, arm.difference, arm.score_mean) == ("diverged", None, 0.1)
    assert (arm.steps_to_target_mean, arm.images_per_second_mean, arm.steps_ratio, arm.overhead) == (None,) * 4
    assert all(math.isfinite(value) for _, value in arm if isinstance(value, float))


def rates(*results):
    runs = [
        run("batch", seed, [accuracy], rate=rate, diverged=diverged)
        for seed, (rate, accuracy, diverged) in enumerate(results)
    ]
    return statistics.with_targets(runs, "batch", None, JUDGE)


@pytest.mark.parametrize(
    ("trials", "highest", "is_bound"),
    [
        (rates((0.1, 0.8, False), (1.0, 0.8, False), (10.0, 0.1, True)), 1.0, False),
        (rates((0.1, 0.8, False), (1.0, 0.7, False)), 1.0, True),
        (rates((0.1, 0.8, False), (1.0, 0.1, False), (10.0, 0.7, False)), 0.1, False),  # collapsed: a finite loss
        (rates((0.1, 0.1, True), (1.0, 0.1, True)), None, False),
        (rates((0.1, 0.8, False)), None, False),
        (rates((0.1, 0.11, False), (1.0, 0.1, False)), None, False),  # the best of all these has not learned either
    ],
    ids=["diverges", "all stable", "collapses in between", "none stable", "one rate", "none learned"],
)
def test_the_highest_stable_rate(trials, highest, is_bound):
    assert statistics.stable_rates(trials, "accuracy", (100,) * 10) == (highest, is_bound)


def searched(*results):
    return [
        SearchTrial.model_construct(
            arm="batch", tuned={"train.learning_rate": rate}, learning_rate=rate, diverged=False, learned=learned,
            best_accuracy=accuracy, final_accuracy=accuracy,
        )
        for rate, accuracy, learned in results
    ]  # fmt: skip


def test_a_rate_that_did_not_learn_is_not_stable_and_one_below_the_best_is_only_slow():
    slow = searched((0.001, 0.6, False), (0.1, 0.8, True), (1.0, 0.75, True), (10.0, 0.6, False))
    assert statistics.stable_rates(slow, "accuracy", (100,) * 10) == (1.0, False)
    assert statistics.stable_rates(searched((0.1, 0.6, False), (1.0, 0.6, False)), "accuracy", (100,) * 10) == (
        None,
        False,
    )


def chosen(name, rate, **counts):
    return ArmSummary.model_construct(
        arm=name, tuned={"train.learning_rate": rate}, n=3, **{"diverged": 0, "not_learned": 0, **counts}
    )


def test_an_extended_grid_has_its_edge_where_the_last_trial_was():
    grid, tune = {"train.learning_rate": (0.1, 0.2, 0.5)}, ["train.learning_rate"]
    trials = searched(*((rate, 0.8, True) for rate in (0.1, 0.2, 0.5, 1.25)))
    assert statistics.warnings_of([chosen("batch", 0.5)], grid, tune, trials) == []
    assert statistics.warnings_of([chosen("batch", 1.25)], grid, tune, trials) == [
        "The best train.learning_rate of batch is the highest that was tried, 1.25: a better one may lie beyond it."
    ]


def test_true_is_no_edge_of_a_grid_and_an_untried_value_none_either():
    grid = {"model.zero_init": (True, False), "train.learning_rate": (0.1, 0.2)}
    untried = ArmSummary.model_construct(
        arm="none", tuned={"train.learning_rate": 0.1}, n=3, diverged=0, not_learned=0, search_undecided="no_budget"
    )
    flag = ArmSummary.model_construct(arm="batch", tuned={"model.zero_init": True}, n=3, diverged=0, not_learned=0)
    assert statistics.warnings_of([flag], grid, ["model.zero_init"]) == []
    assert statistics.warnings_of([untried], grid, ["train.learning_rate"]) == []


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
        "1 of 3 runs of the baseline diverged or did not learn: differences from it are over the other seeds."
    ]


def test_intervals_without_test_images_are_said():
    (text,) = statistics.warnings_of([chosen("none", 0.2), summarized(BASE, BATCH)], {}, [])
    assert text.startswith("Intervals are over seeds alone")


def test_what_was_not_measured_is_what_did_not_vary():
    grid = {"model.norm": ("none", "batch"), "train.batch_size": (32, 64)}
    assert statistics.not_measured(grid, 1, gradient_norms=True) == [
        "other learning rates", "other depths", "other networks", "other numbers of workers",
        "how much results vary with the seed (compare.seeds has one)",
    ]  # fmt: skip
