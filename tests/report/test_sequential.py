"""Seeds until a difference is certain."""

import numpy as np
import pytest

from pipeline.report.intervals import half_width, spread_of
from pipeline.report.sequential import (
    FIRST_LOOK,
    STOPPED_LEVEL,
    decide,
    look_level,
    repeated_half_width,
    repeated_p_value,
)


def decision(by_seed, images=0.0, max_seeds=10, smallest=0.005):
    n = len(by_seed)
    return decide(
        spread_of(np.array(by_seed), np.full((n, n), images**2)), max_seeds=max_seeds, smallest_difference=smallest
    )


def test_one_look_alone_has_the_whole_level():
    assert look_level(0.05, 3) == pytest.approx(0.05, abs=0.003)


def test_more_looks_have_stricter_levels_each_but_no_stricter_than_bonferroni():
    levels = [look_level(0.05, seeds) for seeds in range(3, 15)]
    assert levels == sorted(levels, reverse=True)
    assert all(level > 0.05 / (seeds - 2) for seeds, level in zip(range(4, 15), levels[1:], strict=True))
    assert look_level(1e-4, 10) == pytest.approx(look_level(1e-3, 10) / 10)


def test_without_a_difference_any_look_finds_one_as_often_as_the_level_says():
    """Other random numbers than those of the calibration."""
    rng = np.random.default_rng(3)
    values = rng.standard_normal((20_000, 8))
    found = np.zeros(20_000, bool)
    for n in range(FIRST_LOOK, 9):
        errors = values[:, :n].std(axis=1, ddof=1) / np.sqrt(n)
        found |= np.abs(values[:, :n].mean(axis=1)) > repeated_half_width(errors, np.zeros(20_000), n, 8)
    assert found.mean() == pytest.approx(0.05, abs=0.006)


def test_states():
    assert decision([0.1, 0.1]).state == "continue"
    assert decision([0.1, 0.1]).interval is None
    assert decision([0.10, 0.101, 0.102]).state == "clear"
    assert decision([-0.10, -0.101, -0.102]).state == "clear"
    assert decision([0.0001, 0.0, -0.0001]).state == "equivalent"
    assert decision([0.0, 0.01, 0.02]).state == "continue"
    assert decision([0.0, 0.01, 0.02], max_seeds=3, smallest=0.001).state == "exhausted"
    assert decision([0.10, 0.101, 0.102], images=0.2).state == "continue"


def test_an_early_stop_reports_an_interval_within_the_repeated_one():
    by_seed, images = [0.10, 0.101, 0.1025], 0.002
    clear = decision(by_seed, images)
    seeds = np.std(by_seed, ddof=1) / np.sqrt(3)
    assert (clear.interval.high - clear.interval.low) / 2 == pytest.approx(half_width(seeds, images, 3, STOPPED_LEVEL))
    assert half_width(seeds, images, 3, STOPPED_LEVEL) < repeated_half_width(seeds, images, 3, 10)
    last = decision([0.0, 0.01, 0.02], max_seeds=3, smallest=0.001)
    errors = 0.01 / np.sqrt(3)
    assert last.interval.high == pytest.approx(0.01 + repeated_half_width(errors, 0.0, 3, 3))


@pytest.mark.parametrize("images", [0.0, 0.01])
def test_the_p_value_agrees_with_the_decision(images):
    rng = np.random.default_rng(2)
    states = set()
    for _ in range(40):
        by_seed = rng.normal(rng.choice([0, 0.03, 0.08]), 0.01, 4)
        spread = spread_of(by_seed, np.full((4, 4), images**2))
        state = decide(spread, max_seeds=10, smallest_difference=1e-6).state
        assert (repeated_p_value(spread, 10) < 0.05) == (state == "clear")
        states.add(state)
    assert states == {"clear", "continue"}


@pytest.mark.parametrize("max_seeds", [2, 3])
def test_a_maximum_that_leaves_no_look_is_refused(max_seeds):
    with pytest.raises(ValueError, match=rf"compare\.max_seeds={max_seeds}"):
        decision([0.1, 0.1, 0.1, 0.2], max_seeds=max_seeds)
