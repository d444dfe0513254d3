"""The sentences of a comparison."""

import re

import pytest
from small_comparisons import comparison_of, many_arms, with_arms

from pipeline.report.comparison import Difference
from pipeline.report.verdict import verdict

MANY = many_arms(diverged={"batch, rank_batch_size 2": 1})


def test_verdict_of_two_arms():
    comparison = comparison_of(seeds=3)
    none, batch = comparison.arms
    lines = verdict(comparison)
    assert lines[0] == (
        f"Batch norm was the most accurate: {100 * batch.best_accuracy_mean:.2f}% ± "
        f"{100 * batch.best_accuracy_std:.2f} (n = 3) on the test split; the baseline, no normalization, had "
        f"{100 * none.best_accuracy_mean:.2f}% ± {100 * none.best_accuracy_std:.2f} (n = 3)."
    )
    difference = {key: 100 * value for key, value in batch.difference}
    assert difference["low"] > 0
    assert lines[1].startswith(
        f"Batch norm was {difference['mean']:.2f} points above no normalization, 95% interval "
        f"{difference['low']:+.2f} to {difference['high']:+.2f} (n = 3); it needed 1/"
    )
    assert lines[1].endswith("training time to reach the best accuracy of no normalization.")
    assert lines[2] == (
        "Highest stable learning rate of those tried: 0.1 for no normalization; at least 0.5 for batch norm."
    )
    assert lines[3].startswith("Training time for an image against no normalization: batch norm +")
    assert len(lines) == 4


def with_arm(comparison, **changes):
    return verdict(with_arms(comparison, {}, changes))[1]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (14.2, "needed 1/14 of the steps"), (1200.0, "needed 1/1,200 of the steps"), (2.5, "needed 1/2.5 of the steps"),
        (1.25, "needed 20% fewer steps"), (1.001, "needed as many steps"), (0.8, "needed 25% more steps"),
        (0.25, "needed 4 times the steps"),
    ],
)  # fmt: skip
def test_ratios_in_words(ratio, text):
    assert f"it {text} and 10% more training time to reach" in with_arm(
        comparison_of(), steps_ratio=ratio, seconds_ratio=1 / 1.1
    )


def test_an_interval_around_zero_is_no_difference():
    line = with_arm(comparison_of(), difference=Difference(mean=0.001, low=-0.002, high=0.004, n=2))
    assert line.startswith(
        "Between batch norm and no normalization no difference could be seen: +0.10 points, 95% interval −0.20 to "
        "+0.40 (n = 2);"
    )


def test_one_seed_says_nothing_about_chance():
    line = verdict(comparison_of(seeds=1))[1]
    assert "points above no normalization with a single seed, so nothing can be said about chance; it needed" in line
    many = verdict(many_arms(seeds=1))
    assert any(line.endswith("with a single seed, nothing can be said about chance.") for line in many)


def test_an_arm_that_did_not_arrive_everywhere():
    assert "(in 1 of 2 runs)." in with_arm(comparison_of(), reached_target=1)
    never = {"reached_target": 0, "steps_to_target_mean": None, "steps_ratio": None, "seconds_ratio": None}
    assert with_arm(comparison_of(), **never).endswith("it never reached the best accuracy of no normalization.")
    assert verdict(comparison_of(target_accuracy=0.99))[1].endswith(
        "it never reached 99%, and neither did the baseline."
    )
    line = verdict(comparison_of(target_accuracy=0.895))[1]
    assert re.search(r"it reached 89\.5% after \d+ steps, which the baseline never did\.$", line)


def test_arms_with_the_same_figures_share_the_first_place():
    comparison = with_arms(comparison_of(), {"best_accuracy_mean": 0.9}, {"best_accuracy_mean": 0.9 + 1e-6})
    assert verdict(comparison)[0].startswith(
        "No normalization and batch norm were equally accurate, and no arm was more so: 90.00% ± "
    )


def test_arms_that_diverged():
    every = verdict(comparison_of(diverged={"none": 2, "batch": 2}))
    assert every[0] == "Every run of every arm diverged: the comparison says nothing about accuracy."
    assert every[1].startswith("Highest stable learning rate of those tried: ")
    assert len(every) == 2
    base = verdict(comparison_of(diverged={"none": 2}))
    assert base[0].startswith("Batch norm was the most accurate")
    assert base[1] == "All runs of the baseline, no normalization, diverged: differences from it are not given."
    assert "No normalization diverged in 2 of 2 runs." in base
    other = verdict(comparison_of(diverged={"batch": 2}))
    assert other[0].startswith("No normalization, the baseline, was the most accurate")
    assert "Batch norm diverged in 2 of 2 runs." in other
    assert not any("points" in line for line in other)


def test_an_arm_alone_has_nothing_to_be_compared_with():
    lines = verdict(comparison_of({}, seeds=1, rates=(0.1,), gradient_norms=False))
    assert len(lines) == 1
    assert re.fullmatch(r"Batch norm, the only arm, had \d\d\.\d\d% \(n = 1\) on the test split\.", lines[0])


def test_steps_of_another_size_are_said_to_be():
    line = verdict(comparison_of({"train.rank_batch_size": [8, 64]}, target_accuracy=0.8))[1]
    assert ", steps of 128 images instead of 16, to reach" in line


def test_of_many_arms_the_verdict_is_short():
    comparison = MANY
    lines = verdict(comparison)
    assert lines[0].startswith("Batch norm with rank batch size 128 was the most accurate: ")
    kinds = ["no normalization", "batch norm", "group norm", "layer norm"]
    assert [line.partition(":")[0] for line in lines[1:5]] == [f"Best of {kind}" for kind in kinds]
    assert re.match(r"Best of batch norm: rank batch size 128, 91\.\d\d% ± ", lines[2])
    assert lines[5].startswith("Of 27 other arms, ")
    assert "1 of 28 arms had runs that diverged: batch norm with rank batch size 2." in lines
    assert len(lines) <= 10
    counts = [int(number) for number in re.findall(r"(\d+) (?:were|below|no)", lines[5])]
    assert sum(counts) == 27
    assert all(len(line) < 400 for line in lines)


def test_many_arms_of_one_setting_have_no_groups():
    lines = verdict(comparison_of({"model.width": list(range(8, 80, 8))}))
    assert not any(line.startswith("Best of") for line in lines)
    assert len(lines) <= 6
