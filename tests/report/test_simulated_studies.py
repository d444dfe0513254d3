"""What the statistics of a comparison are worth, on studies with a known truth; a few hundred, or 5,000 (slow)."""

import numpy as np
import pytest
from simulated_studies import SimulatedArms, simulated_arms, simulated_study

from pipeline.report.comparison import by
from pipeline.report.differences import difference_of
from pipeline.report.sequential import FIRST_LOOK, decide
from pipeline.report.significance import holm
from pipeline.report.until_certain import open_arms

MAX_SEEDS, SMALLEST = 10, 0.005
FEW, MANY = 800, 5_000
# How far the share of few studies may lie from that of many: three standard errors of 5% of them.
SLACK = 3 * np.sqrt(0.05 * 0.95 / FEW)


def covered_and_signs(studies, seeds, *, balanced):
    """Share of intervals that hold the truth; share of those without zero whose sign is wrong; share without zero."""
    rng = np.random.default_rng([seeds, balanced])
    covered, wrong, clear = [], [], []
    for _ in range(studies):
        study = simulated_study(rng, seeds=seeds, balanced=balanced)
        low, high = study.spread().interval()
        covered.append(low <= study.truth <= high)
        clear.append(low > 0 or high < 0)
        if clear[-1]:
            wrong.append((low > 0) != (study.truth > 0))
    return np.mean(covered), np.mean(wrong), np.mean(clear)


def decided(studies, *, gap=None, seed_deviation=None, balanced=False):
    """The truth, the decision and the seeds that it took, of each study with seeds until certain."""
    rng = np.random.default_rng([7, balanced])
    for _ in range(studies):
        study = simulated_study(
            rng, seeds=MAX_SEEDS, gap=gap, seed_deviation=seed_deviation, balanced=balanced, images=600
        )
        for spread in study.spreads(FIRST_LOOK):
            decision = decide(spread, max_seeds=MAX_SEEDS, smallest_difference=SMALLEST)
            if decision.state != "continue":
                yield study.truth, decision, spread.n
                break


def covers(truth, interval):
    return interval.low <= truth <= interval.high


@pytest.mark.parametrize("balanced", [False, True], ids=["accuracy", "balanced accuracy"])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_headline_interval_covers_the_truth(seeds, balanced):
    covered, wrong, clear = covered_and_signs(FEW, seeds, balanced=balanced)
    assert 0.94 - SLACK < covered < min(0.965 + SLACK, 1)
    assert wrong <= 0.025
    assert clear > 0.25


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [False, True], ids=["accuracy", "balanced accuracy"])
@pytest.mark.parametrize("seeds", [3, 5])
def test_the_headline_interval_covers_the_truth_of_5000_studies(seeds, balanced):
    covered, wrong, clear = covered_and_signs(MANY, seeds, balanced=balanced)
    print(f"seeds {seeds}, balanced {balanced}: covered {covered:.4f}, wrong sign {wrong:.4f}, clear {clear:.3f}")
    assert 0.94 <= covered <= 0.965
    assert wrong <= 0.025


def test_seeds_until_certain_stop_early_and_cover_the_truth():
    results = list(decided(FEW))
    assert np.mean([covers(truth, decision.interval) for truth, decision, _ in results]) > 0.94 - SLACK
    clear = [(truth, decision) for truth, decision, _ in results if decision.state == "clear"]
    assert np.mean([(decision.interval.low > 0) != (truth > 0) for truth, decision in clear]) <= 0.025
    assert len(clear) > 0.25 * FEW
    seeds = [n for _, _, n in decided(60, gap=0.8, seed_deviation=0.05)]
    assert np.mean(seeds) <= MAX_SEEDS / 2


@pytest.mark.slow
@pytest.mark.parametrize("balanced", [False, True], ids=["accuracy", "balanced accuracy"])
def test_seeds_until_certain_cover_the_truth_of_5000_studies(balanced):
    results = list(decided(MANY, balanced=balanced))
    covered = np.mean([covers(truth, decision.interval) for truth, decision, _ in results])
    clear = [(truth, decision, n) for truth, decision, n in results if decision.state == "clear"]
    wrong = np.mean([(decision.interval.low > 0) != (truth > 0) for truth, decision, _ in clear])
    saved = 1 - np.mean([n for *_, n in clear]) / MAX_SEEDS
    print(f"covered {covered:.4f}, wrong sign {wrong:.4f}, clear {len(clear) / MANY:.3f}, saved of them {saved:.2f}")
    assert 0.94 <= covered <= 0.965
    assert wrong <= 0.025


@pytest.mark.slow
def test_where_nothing_differs_all_looks_together_hold_the_level():
    results = list(decided(MANY, gap=0.0))
    clear = np.mean([decision.state == "clear" for _, decision, _ in results])
    print(f"clear without a difference: {clear:.4f}")
    assert clear <= 0.06  # 5%, and three standard errors of 5,000 studies


@pytest.mark.slow
def test_a_clear_difference_saves_half_of_the_trials():
    results = list(decided(MANY, gap=0.8, seed_deviation=0.05))
    saved = 1 - np.mean([n for *_, n in results]) / MAX_SEEDS
    clear = np.mean([decision.state == "clear" for _, decision, _ in results])
    print(f"saved {saved:.3f}, clear {clear:.3f}")
    assert saved >= 0.5
    assert clear >= 0.99


def answers(study: SimulatedArms):
    """Each arm's difference at the look at which it stopped and its corrected p-value, as `run_seeds` would stop it.

    An arm that stops keeps its seeds, as in a study, while the others and the baseline get more.
    """
    still_open = list(study.truths)[1:]
    seeds = dict.fromkeys(study.truths, FIRST_LOOK)
    while True:
        runs = [run for run in study.runs if run.seed < seeds[run.arm]]
        now = open_arms(runs, study.predictions, "accuracy", SMALLEST, MAX_SEEDS)
        still_open = [name for name in still_open if name in now]
        if not still_open or seeds["baseline"] == MAX_SEEDS:
            break
        seeds |= dict.fromkeys(["baseline", *still_open], seeds["baseline"] + 1)
    of_arm = by(runs, lambda run: run.arm)
    base = of_arm.pop("baseline")
    found = {
        name: difference_of(arm, base, study.predictions, "accuracy", SMALLEST, MAX_SEEDS)
        for name, arm in of_arm.items()
    }
    adjusted = holm([difference.p_value for difference in found.values()])
    return dict(zip(found, zip(found.values(), adjusted, strict=True), strict=True)), seeds


def judged(studies, gaps):
    """Share of studies with a clear difference; of intervals that hold the truth; of clear ones with a wrong sign."""
    rng, any_clear, covered, wrong, taken = np.random.default_rng(11), [], [], [], []
    for _ in range(studies):
        study = simulated_arms(rng, gaps=gaps, seeds=MAX_SEEDS)
        found, seeds = answers(study)
        clear = {name: difference for name, (difference, p_value) in found.items() if p_value <= 0.05}
        any_clear.append(bool(clear))
        wrong += [(difference.mean > 0) != (study.truths[name] > 0) for name, difference in clear.items()]
        covered += [each.low <= study.truths[name] <= each.high for name, (each, _) in found.items()]
        taken += [seeds[name] for name in found]
    return np.mean(any_clear), np.mean(covered), np.mean(wrong) if wrong else 0.0, np.mean(taken)


def test_seeds_until_certain_of_four_arms_find_nothing_where_nothing_differs():
    any_clear, covered, _, _ = judged(60, gaps=(0.0, 0.0, 0.0))
    assert any_clear <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 60)
    assert covered > 0.9


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("gaps", [(0.0, 0.0, 0.0), None], ids=["nothing differs", "random differences"])
def test_seeds_until_certain_of_four_arms_in_1000_studies(gaps):
    any_clear, covered, wrong, taken = judged(1_000, gaps)
    print(f"{gaps}: any clear {any_clear:.4f}, covered {covered:.4f}, wrong {wrong:.4f}, seeds {taken:.2f}")
    assert covered >= 0.94
    if gaps is None:
        assert covered <= 0.965
        assert wrong <= 0.025
    else:  # most arms take all looks, for which the intervals that are reported are wide
        assert any_clear <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / 1_000)
