"""Intervals over seeds and images, against a bootstrap, quadrature and numbers by hand."""

import math

import numpy as np
import pytest
from scipy.special import gammaincinv, ndtr

from pipeline.report.intervals import half_width, image_covariance, mean_score, spread_of

# Student's t and the normal quantile of 0.975, from printed tables.
T_975, Z_975 = {2: 12.706205, 3: 4.302653, 5: 2.776445}, 1.959964


def differences(seeds=3, images=400):
    """Of three classes of unequal size; what is right is partly shared between seeds."""
    rng = np.random.default_rng(5)
    labels = np.repeat([0, 1, 2], [images // 2, images // 4, images // 4])
    ease = rng.standard_normal(images) + 0.4 * labels
    right = rng.standard_normal((2, seeds, images)) < ease
    return right[1].astype(float) - right[0], labels


@pytest.mark.parametrize("balanced", [False, True])
def test_the_covariance_over_images_is_that_of_a_bootstrap_of_shared_images(balanced):
    values, labels = differences()
    rng = np.random.default_rng(0)
    replicates = []
    for _ in range(6_000):
        if balanced:
            drawn = np.concatenate([rng.choice(np.flatnonzero(labels == label), (labels == label).sum())
                                    for label in range(3)])  # fmt: skip
            replicates.append(mean_score(values[:, drawn], labels[drawn]))
        else:
            replicates.append(values[:, rng.integers(0, 400, 400)].mean(axis=1))
    found = image_covariance(values, labels if balanced else None)
    np.testing.assert_allclose(found, np.cov(np.transpose(replicates)), rtol=0.1, atol=1e-5)


def test_balanced_accuracy_weighs_classes_alike():
    labels = np.array([0, 0, 0, 0, 1, 1])
    correct = np.array([[1, 1, 1, 0, 0, 1], [0, 0, 0, 0, 1, 1]])
    np.testing.assert_allclose(mean_score(correct, labels), [(3 / 4 + 1 / 2) / 2, 1 / 2])
    np.testing.assert_allclose(mean_score(correct), [4 / 6, 2 / 6])


def test_a_class_of_one_image_is_not_taken_for_certain():
    values, labels = np.array([[1.0, 0.0, 1.0]]), np.array([0, 0, 1])
    # The first class: variance 1/2 of two images; the second: its square.
    assert image_covariance(values, labels)[0, 0] == pytest.approx((0.5 / 2 + 1) / 4)


def test_the_parts_are_students_and_the_normal_interval():
    by_seed, covariance = np.array([0.01, 0.02, 0.06]), np.array([[4.0, 1, 2], [1, 5, 3], [2, 3, 6]]) * 1e-6
    spread = spread_of(by_seed, covariance)
    seeds = T_975[3] * by_seed.std(ddof=1) / math.sqrt(3)
    assert spread.over_seeds() == pytest.approx((0.03 - seeds, 0.03 + seeds), abs=1e-8)
    # What the seeds share: the mean covariance of two of them.
    images = Z_975 * math.sqrt(6e-6 / 3)
    assert spread.over_images() == pytest.approx((0.03 - images, 0.03 + images), abs=1e-8)
    assert spread.images == pytest.approx(math.sqrt((1 + 2 + 3) / 3 * 1e-6))
    low, high = spread.interval()
    assert spread.covers == "seeds and images"
    assert seeds - 1e-8 <= (high - low) / 2 < math.hypot(seeds, Z_975 * spread.images)


def test_the_headline_interval_is_exact_where_either_part_is_nothing():
    for n, t in T_975.items():
        assert half_width(0.5, 0.0, n) == pytest.approx(t * 0.5, rel=1e-6)
        assert half_width(0.0, 0.5, n) == pytest.approx(Z_975 * 0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("n", "lowest", "highest"), [(3, 0.949, 0.958), (4, 0.946, 0.9535), (5, 0.947, 0.9525), (10, 0.949, 0.951)]
)
def test_coverage_of_the_headline_interval_by_quadrature(n, lowest, highest):
    """Over the distribution of the seeds' sample variance, for shares of the images from none to nearly all."""
    points = (np.arange(20_000) + 0.5) / 20_000
    seeds = np.sqrt(gammaincinv((n - 1) / 2, points) * 2 / (n - 1))  # sample deviation / deviation
    for images in (0, *np.geomspace(0.1, 20, 40)):
        half = half_width(seeds, np.full_like(seeds, images), n)
        covered = np.mean(2 * ndtr(half / math.hypot(1, images)) - 1)
        assert lowest <= covered <= highest


@pytest.mark.parametrize("n", [2, 3, 10])
def test_the_p_value_is_where_the_interval_touches_zero(n):
    values, _ = differences(seeds=n)
    spread = spread_of(values.mean(axis=1) + 0.02, image_covariance(values))
    level = spread.p_value()
    assert spread.half_width(level) == pytest.approx(abs(spread.mean), rel=1e-6)
    ends = spread.interval()
    assert (level < 0.05) == (not ends.low <= 0 <= ends.high)


def test_p_values_of_extremes():
    assert spread_of(np.zeros(3), np.zeros((3, 3))).p_value() == 1
    assert spread_of(np.ones(3), np.zeros((3, 3))).p_value() == 0
    assert spread_of(np.array([0.1])).p_value() is None


def test_what_is_not_known_is_not_covered():
    one = spread_of(np.array([0.02]), np.array([[4e-6]]))
    assert (one.covers, one.over_seeds(), one.seeds_needed(0.005)) == ("images", None, None)
    assert one.interval() == one.over_images() == pytest.approx((0.02 - Z_975 * 2e-3, 0.02 + Z_975 * 2e-3), abs=1e-8)
    old = spread_of(np.array([0.02, 0.03]))
    assert (old.covers, old.over_images()) == ("seeds", None)
    assert old.interval() == old.over_seeds()
    assert spread_of(np.array([0.02])).interval() is None


def test_seeds_that_are_needed():
    by_seed = np.array([0.0, 0.01, 0.02])  # mean 0.01, deviation 0.01
    spread = spread_of(by_seed, np.zeros((3, 3)))
    assert spread.seeds_needed(0.005) == 7  # t of 6 degrees of freedom: 2.447 / sqrt(7) < 1 < 2.571 / sqrt(6)
    assert spread_of(by_seed, np.full((3, 3), 0.01**2)).seeds_needed(0.005) is None  # 1.96 > 1, whatever the seeds
    # Too near to zero to be told from it, but soon known to be smaller than what matters.
    assert spread_of(by_seed - 0.01, np.zeros((3, 3))).seeds_needed(0.02) == 4
