"""How sure a comparison is of an arm."""

import pytest
from small_comparisons import comparison_of

from pipeline.report.grades import grade_of

BASELINE, ARM = comparison_of(seeds=3).arms


def grade(low, high, p_value, p_adjusted=None, *, n=3, baseline=None, **counts):
    difference = ARM.difference.model_copy(
        update={"low": low, "high": high, "p_value": p_value, "n": n, "p_adjusted": p_adjusted}
    )
    arm = ARM.model_copy(update={"difference": difference, **counts})
    return grade_of(arm, BASELINE.model_copy(update=baseline or {}), 0.005)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0.01, 0.03, 0.001), "clear"),
        ((-0.03, -0.01, 0.001), "clear"),
        ((0.01, 0.03, 0.01, 0.05), "clear"),
        ((0.01, 0.03, 0.01, 0.06), "likely"),  # with the other arms, chance alone gives one such
        ((0.01, 0.03, 0.04, 0.3), "likely"),
        ((-0.001, 0.03, 0.07), "likely"),  # zero is outside of the 80% interval
        ((-0.001, 0.03, 0.07, 0.21), "cannot be told"),
        ((-0.02, 0.03, 0.7), "cannot be told"),
        ((-0.002, 0.004, 0.6), "equivalent"),
        ((0.001, 0.004, 0.01), "equivalent"),  # too small to matter, though not zero
        ((-0.002, 0.005, 0.6), "cannot be told"),
        ((None, None, None), "cannot be told"),
    ],
)
def test_grades_of_a_difference(numbers, expected):
    assert grade(*numbers) == expected


def test_nothing_is_clear_with_one_seed_or_a_baseline_that_fell():
    assert grade(0.01, 0.03, 0.001, n=1) == "likely"
    assert grade(-0.001, 0.002, 0.6, n=1) == "cannot be told"
    assert grade(0.01, 0.03, 0.001, baseline={"diverged": 1}) == "likely"
    assert grade(0.01, 0.03, 0.001, baseline={"not_learned": 1}) == "likely"


def test_what_fell_has_no_difference():
    assert grade(0.01, 0.03, 0.001, not_learned=1) == "did not learn"
    assert grade(0.01, 0.03, 0.001, not_learned=1, diverged=1) == "diverged"
    assert grade_of(BASELINE, BASELINE, 0.005) is None
    fallen = BASELINE.model_copy(update={"diverged": 1})
    assert grade_of(fallen, fallen, 0.005) == "diverged"
    without = ARM.model_copy(update={"difference": None})
    assert grade_of(without, BASELINE, 0.005) == "cannot be told"
