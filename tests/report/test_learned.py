import math

import pytest

from pipeline.report.learned import constant_score, learned, metric_for, standard_error

LONG_TAIL = (2318, 620, 280, 190, 120, 90, 70, 50, 40, 22)  # 61% of one class


@pytest.mark.parametrize(
    ("counts", "metric"),
    [
        ([100] * 10, "accuracy"),
        (LONG_TAIL, "balanced_accuracy"),
        ([60, 40], "accuracy"),
        ([20, 5, 5, 5, 5], "balanced_accuracy"),  # 1/2 > 2/5
        ([2, 1, 1], "accuracy"),  # 1/2 < 2/3
        ([20, 10, 5, 5, 5, 5], "balanced_accuracy"),  # 0.4 > 2/6
    ],
)
def test_the_metric_follows_from_the_largest_class(counts, metric):
    assert metric_for("auto", counts) == metric
    assert metric_for("accuracy", counts) == "accuracy"


def test_the_best_constant_network():
    assert constant_score("accuracy", LONG_TAIL) == 2318 / 3800
    assert constant_score("balanced_accuracy", LONG_TAIL) == 0.1
    assert constant_score("balanced_accuracy", (5, 0, 5)) == 0.5  # a class without images has no recall


def test_standard_errors_are_binomial():
    assert standard_error(0.8, "accuracy", (60, 40)) == pytest.approx(math.sqrt(0.16 / 100))
    # Mean of two recalls of 60 and 40 images.
    assert standard_error(0.8, "balanced_accuracy", (60, 40)) == pytest.approx(math.sqrt(0.16 / 60 + 0.16 / 40) / 2)


@pytest.mark.parametrize(
    ("score", "metric", "expected"),
    [
        (0.6099, "accuracy", False),  # a network that answers with the largest class alone has 61.0%
        (0.62, "accuracy", False),
        (0.63, "accuracy", True),
        (0.1, "balanced_accuracy", False),
        (0.12, "balanced_accuracy", False),
        (0.2, "balanced_accuracy", True),
    ],
)
def test_a_network_that_is_no_better_than_a_constant_did_not_learn(score, metric, expected):
    assert learned(score, metric, LONG_TAIL) is expected
