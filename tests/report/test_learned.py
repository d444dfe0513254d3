import numpy as np
import pytest

from pipeline.report.learned import beats_constant, constant_score, learned, metric_for

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


def recalls(large, others):
    """Of the largest class and of each other."""
    return (large, *[others] * (len(LONG_TAIL) - 1))


@pytest.mark.parametrize(
    ("recall", "metric", "expected"),
    [
        (recalls(1.0, 0.0), "accuracy", False),  # a network that answers with the largest class alone
        (recalls(0.99, 0.02), "accuracy", False),
        (recalls(0.9, 0.18), "accuracy", False),  # right of 265 others, wrong of 232 of the largest
        (recalls(0.9, 0.25), "accuracy", True),
        (recalls(1.0, 0.01), "accuracy", True),  # 15 more, and none fewer: no chance of images does that
        (recalls(1.0, 0.0), "balanced_accuracy", False),
        (recalls(0.2, 0.11), "balanced_accuracy", False),
        (recalls(0.3, 0.3), "balanced_accuracy", True),
    ],
)
def test_a_network_that_is_no_better_than_a_constant_did_not_learn(recall, metric, expected):
    assert learned(recall, metric, LONG_TAIL) is expected


def test_a_class_without_images_counts_for_nothing():
    assert learned((0.9, None, 0.9), "balanced_accuracy", (50, 0, 50))
    assert not learned((1.0, None, 0.0), "balanced_accuracy", (50, 0, 50))


def test_the_uncertainty_is_that_of_the_paired_difference_over_images():
    """The counts of classes are all that the mean and its standard error over single images need."""
    random = np.random.default_rng(0)
    for _ in range(300):
        labels = np.sort(random.choice(4, 120, p=[0.5, 0.25, 0.15, 0.1]))
        right = random.random(120) < random.uniform(0.3, 0.8)
        weights = random.uniform(0.2, 3, 4)
        largest = np.bincount(labels, weights[labels], minlength=4).argmax()
        ahead = weights[labels] * (right.astype(float) - (labels == largest))
        expected = ahead.mean() > 1.959964 * ahead.std(ddof=1) / np.sqrt(120)
        counts = np.bincount(labels, minlength=4)
        assert beats_constant(np.bincount(labels[right], minlength=4), counts, weights) == expected


def test_luck_alone_has_learned_as_rarely_as_the_interval_says():
    """A network that is right of 60% of images, as the constant one is in the mean over draws of images."""
    random, found = np.random.default_rng(1), []
    for _ in range(4000):
        large = random.binomial(1000, 0.6)
        counts = np.array([large, 1000 - large])
        hits = np.array([random.binomial(large, 0.8), random.binomial(1000 - large, 0.3)])
        found.append(beats_constant(hits, counts, np.ones(2)))
    assert 0.017 < np.mean(found) < 0.033
