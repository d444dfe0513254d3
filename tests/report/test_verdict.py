"""The sentences of a comparison."""

import json
import re

import pytest
from small_comparisons import comparison_of, many_arms, with_arms

from pipeline.report import speed
from pipeline.report.comparison import Comparison
from pipeline.report.verdict import best_arm, verdict

MANY = many_arms(diverged={"batch, rank_batch_size 2": 1})


def texts(comparison):
    return [line.text for line in verdict(comparison)]


def grades(comparison):
    return [(line.id, line.grade) for line in verdict(comparison) if line.grade]


def test_verdict_of_two_arms():
    comparison = comparison_of(seeds=3)
    none, batch = comparison.arms
    lines = texts(comparison)
    assert lines[0] == (
        f"Batch norm was the most accurate: {100 * batch.score_mean:.2f}% ± {100 * batch.score_std:.2f} (n = 3) on the "
        f"test split; the baseline, no normalization, had {100 * none.score_mean:.2f}% ± {100 * none.score_std:.2f} "
        "(n = 3)."
    )
    mean, low, high = (100 * getattr(batch.difference, part) for part in ("mean", "low", "high"))
    assert low > 0
    assert lines[1] == (
        f"Clear: batch norm was {mean:.2f} points above no normalization, 95% interval {low:+.2f} to {high:+.2f} over "
        "seeds and images (n = 3)."
    )
    assert lines[2].startswith("Batch norm needed 1/")
    assert lines[2].endswith("training time to reach the final accuracy of no normalization.")
    assert lines[3] == (
        "Highest stable learning rate of those tried: 0.1 for no normalization; at least 0.5 for batch norm."
    )
    assert lines[4].startswith("Training time for an image against no normalization: batch norm +")
    assert len(lines) == 5
    assert grades(comparison) == [("verdict-difference-1", "clear")]


STUDIES = {
    "three seeds": comparison_of(seeds=3),
    "old runs": comparison_of(predictions=False),
    "fallen": comparison_of({"model.norm": ["none", "batch", "group"]}, seeds=3, diverged={"batch": 1},
                            not_learned={"group": 2}),
    "many": MANY,
    "nothing": comparison_of(diverged={"none": 2, "batch": 2}),
}  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_every_sentence_names_the_values_of_the_file_that_it_rests_on(name):
    comparison = STUDIES[name]
    assert list(comparison.verdict) == verdict(comparison)
    tree = json.loads(comparison.model_dump_json(exclude_unset=True))
    assert Comparison.model_validate(tree).model_dump(mode="json", exclude_unset=True) == tree
    ids = [line["id"] for line in tree["verdict"]]
    assert len(set(ids)) == len(ids)
    for line in tree["verdict"]:
        assert line["evidence"], line["id"]
        for pointer, value in line["evidence"].items():
            found = tree
            for part in pointer.split("/")[1:]:
                found = found[int(part)] if isinstance(found, list) else found[part]
            assert found == value, pointer
        if "arm" in line:
            assert line["arm"] in {arm["arm"] for arm in tree["arms"]}


def test_the_numbers_of_a_difference_are_its_evidence():
    line = verdict(comparison_of(seeds=3))[1]
    for end in ("mean", "low", "high"):
        assert f"{100 * line.evidence[f'/arms/1/difference/{end}']:.2f}" in line.text


def with_arm(comparison, **changes):
    return next(line.text for line in verdict(with_arms(comparison, {}, changes)) if line.id == "verdict-target-1")


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (14.2, "needed 1/14 of the steps"), (1200.0, "needed 1/1,200 of the steps"), (2.5, "needed 1/2.5 of the steps"),
        (1.25, "needed 20% fewer steps"), (1.001, "needed as many steps"), (0.8, "needed 25% more steps"),
        (0.25, "needed 4 times the steps"),
    ],
)  # fmt: skip
def test_ratios_in_words(ratio, text):
    assert f"Batch norm {text} and 10% more training time to reach" in with_arm(
        comparison_of(), steps_ratio=ratio, seconds_ratio=1 / 1.1
    )


def graded(grade, *, seeds=3, **numbers):
    """The sentence about batch norm, with this grade and these numbers of its difference."""
    comparison = comparison_of(seeds=seeds)
    difference = comparison.arms[1].difference.model_copy(update=numbers)
    arms = with_arms(comparison, {}, {"grade": grade, "difference": difference})
    return next(line.text for line in verdict(arms) if line.id == "verdict-difference-1")


def test_what_cannot_be_told_says_what_would_tell():
    numbers = {"mean": 0.001, "low": -0.012, "high": 0.014, "covers": "seeds and images"}
    assert graded("cannot be told", **numbers, seeds_needed=12) == (
        "Cannot be told: batch norm was 0.10 points above no normalization, 95% interval −1.20 to +1.40 over seeds and "
        "images (n = 3); about 12 seeds would tell, were mean and spread to stay."
    )
    enough = graded("cannot be told", **numbers, seeds_needed=3)  # by the narrower interval of a single look
    assert enough.endswith("(n = 3); more seeds may tell.")
    text = graded("cannot be told", **numbers, seeds_needed=None)
    assert text.endswith(
        "no number of seeds would tell, since the test images alone leave it open: it takes more of them."
    )
    text = graded("cannot be told", **numbers | {"covers": "seeds"}, seeds_needed=None)
    assert text.endswith("; not even a thousand seeds would tell.")


def test_what_is_likely_says_why_it_is_not_clear():
    text = graded("likely", mean=0.01, low=0.001, high=0.019, p_value=0.03, p_adjusted=0.09)
    assert text.startswith("Likely: batch norm was 1.00 points above no normalization, ")
    assert text.endswith("; chance alone gives as much with p = 0.03.")
    three = comparison_of({"model.norm": ["none", "batch", "group"]})
    difference = three.arms[1].difference.model_copy(update={"p_value": 0.03, "p_adjusted": 0.06})
    line = next(
        line.text
        for line in verdict(with_arms(three, {}, {"grade": "likely", "difference": difference}, {}))
        if line.id == "verdict-difference-1"
    )
    assert line.endswith("with p = 0.03, 0.06 after Holm's correction for 2 arms.")


def test_what_is_equivalent_says_to_what():
    text = graded("equivalent", mean=0.001, low=-0.002, high=0.004)
    assert text.startswith("Equivalent: batch norm and no normalization differ by less than 0.5 points: +0.10 points, ")


def test_the_least_sure_comes_first():
    comparison = comparison_of({"model.norm": ["none", "batch", "group", "layer"]}, seeds=3)
    changes = [{}, {"grade": "clear"}, {"grade": "likely"}, {"grade": "cannot be told"}]
    assert [grade for _, grade in grades(with_arms(comparison, *changes))] == ["cannot be told", "likely", "clear"]


def test_one_seed_says_nothing_about_chance():
    line = texts(comparison_of(seeds=1))[1]
    assert line.startswith("Likely: batch norm was ")
    assert line.endswith("over images (n = 1); a single seed says nothing about chance between seeds.")
    assert texts(comparison_of(seeds=1, predictions=False))[1].endswith(
        "points above no normalization; a single seed says nothing about chance between seeds, three or more would."
    )


def test_an_arm_that_did_not_arrive_everywhere():
    assert with_arm(comparison_of(), reached_target=1).endswith("(in 1 of 2 runs).")
    never = {"reached_target": 0, "steps_to_target_mean": None, "steps_ratio": None, "seconds_ratio": None}
    assert with_arm(comparison_of(), **never) == "Batch norm never reached the final accuracy of no normalization."
    assert with_arm(comparison_of(target_accuracy=0.99)) == (
        "Batch norm never reached 99%, and neither did the baseline."
    )
    line = with_arm(comparison_of(target_accuracy=0.895))
    assert re.search(r"Batch norm reached 89\.5% after \d+ steps, which the baseline never did\.$", line)


def test_arms_with_the_same_figures_share_the_first_place():
    comparison = with_arms(comparison_of(), {"score_mean": 0.9}, {"score_mean": 0.9 + 1e-6})
    assert texts(comparison)[0].startswith(
        "No normalization and batch norm were equally accurate, and no arm was better: 90.00% ± "
    )


def test_the_metric_is_called_by_its_name():
    lines = texts(comparison_of(metric="balanced_accuracy"))
    assert lines[0].startswith("Batch norm had the highest balanced accuracy: ")
    assert any("to reach the final balanced accuracy of no normalization" in line for line in lines)


def test_arms_that_diverged_come_first_and_have_no_clear_difference():
    every = verdict(comparison_of(diverged={"none": 2, "batch": 2}))
    assert every[0].text == (
        "Every run of every arm diverged or did not learn: the comparison says nothing about accuracy."
    )
    assert every[1].text.startswith("Highest stable learning rate of those tried: ")
    assert [line.grade for line in every] == ["diverged", None]
    base = texts(comparison_of(diverged={"none": 2}))
    assert base[:2] == [
        "All runs of the baseline, no normalization, diverged or did not learn: differences from it are not given.",
        "2 of 2 runs of no normalization diverged.",
    ]
    assert base[2].startswith("Batch norm was the most accurate")
    other = texts(comparison_of(diverged={"batch": 2}))
    assert other[0] == "2 of 2 runs of batch norm diverged."
    assert other[1].startswith("No normalization, the baseline, was the most accurate")
    assert not any("points" in line for line in other)
    (one, *_), compared = (
        texts(comparison_of(seeds=3, diverged={"batch": 1})),
        comparison_of(seeds=3, diverged={"batch": 1}),
    )
    assert one.startswith("1 of 3 runs of batch norm diverged; over the other seeds alone it was ")
    assert grades(compared) == [("verdict-diverged-1", "diverged")]


def test_an_arm_that_did_not_learn_is_said_not_to_have():
    comparison = comparison_of(seeds=3, not_learned={"batch": 3})
    assert texts(comparison)[0] == (
        "3 of 3 runs of batch norm did not learn: no better than the best constant answer, 10.00%, beyond chance."
    )
    assert grades(comparison) == [("verdict-not-learned-1", "did not learn")]
    both = comparison_of(seeds=3, diverged={"batch": 1}, not_learned={"batch": 1})
    assert grades(both) == [("verdict-diverged-1", "diverged"), ("verdict-not-learned-1", "did not learn")]


TIED = {"search_undecided": "tied", "search_tied": ({"train.learning_rate": 0.1}, {"train.learning_rate": 0.5})}


def test_a_search_that_could_not_decide_is_said():
    line = verdict(with_arms(comparison_of(), {}, TIED))[0]
    assert line.text == (
        "The search of batch norm could not tell learning_rate 0.1 and learning_rate 0.5 apart; learning_rate 0.1 "
        "was taken, the middle one."
    )
    assert line.grade == "search undecided"
    assert line.evidence["/arms/1/search_undecided"] == "tied"
    assert line.evidence["/arms/1/search_tied/1/train.learning_rate"] == 0.5
    assert verdict(with_arms(MANY, {}, TIED, *[{}] * 26))[1].text.startswith("The search of 1 of 28 arms could not")


def test_where_all_values_diverge_the_lowest_was_taken():
    (line, *_) = verdict(with_arms(comparison_of(), {}, {**TIED, "search_undecided": "diverged"}))
    assert line.text == (
        "The search of batch norm saw all of its values diverge; learning_rate 0.1 was taken, the lowest."
    )


def test_a_search_that_could_not_decide_with_several_seeds_says_how_many():
    line = verdict(with_arms(comparison_of(), {}, {**TIED, "search_seeds": 2}))[0]
    assert line.text == (
        "The search of batch norm could not tell learning_rate 0.1 and learning_rate 0.5 apart with 2 seeds; "
        "learning_rate 0.1 was taken, the middle one of those near the best mean."
    )
    assert line.evidence["/arms/1/search_seeds"] == 2


@pytest.mark.parametrize(
    ("why", "words"),
    [
        ("not_learned", "saw none of its trials learn more than the best constant answer"),
        ("diverged", "saw all of its values diverge"),
        ("no_budget", "had no trials, since compare.search_budget holds none"),
    ],
)
def test_why_a_search_could_not_decide_is_said(why, words):
    assert words in verdict(with_arms(comparison_of(), {}, {"search_undecided": why}))[0].text


def test_of_rates_that_were_not_tried_none_is_called_stable():
    untried = {"search_undecided": "no_budget", "highest_stable_rate": None}
    text = " ".join(texts(with_arms(comparison_of(), untried, untried)))
    assert "no trials" in text
    assert "stable" not in text
    one = " ".join(texts(with_arms(comparison_of(), untried, {})))
    assert "Highest stable learning rate of those tried: not tried for no normalization; at least 0.5 for batch" in one


def test_an_arm_alone_has_nothing_to_be_compared_with():
    lines = texts(comparison_of({}, seeds=1, rates=(0.1,), gradient_norms=False))
    assert len(lines) == 1
    assert re.fullmatch(r"Batch norm, the only arm, had \d\d\.\d\d% \(n = 1\) on the test split\.", lines[0])


def test_steps_of_another_size_are_said_to_be():
    line = with_arm(comparison_of({"train.rank_batch_size": [8, 64]}, target_accuracy=0.8))
    assert ", steps of 128 images instead of 16, to reach" in line


def test_of_many_arms_the_verdict_is_short():
    lines = texts(MANY)
    assert lines[0] == "1 of 28 arms had runs that diverged: batch norm with rank batch size 2."
    assert lines[1].startswith("Batch norm with rank batch size 128 was the most accurate: ")
    kinds = ["no normalization", "batch norm", "group norm", "layer norm"]
    assert [line.partition(":")[0] for line in lines[2:6]] == [f"Best of {kind}" for kind in kinds]
    assert re.match(r"Best of batch norm: rank batch size 128, 91\.\d\d% ± ", lines[3])
    assert lines[6].startswith("Of 27 other arms: ")
    assert len(lines) <= 11
    counts = [int(number) for number in re.findall(r"(\d+) (?:clear|likely|equivalent|diverged|it)", lines[6])]
    assert sum(counts) == 27
    assert all(len(line) < 400 for line in lines)
    unlearned = many_arms(not_learned={"batch, rank_batch_size 2": 2})
    assert texts(unlearned)[0] == (
        "1 of 28 arms had runs that did not learn: no better than the best constant answer, 10.00%, beyond chance: "
        "batch norm with rank batch size 2."
    )


def test_many_arms_of_one_setting_have_no_groups():
    lines = texts(comparison_of({"model.width": list(range(8, 80, 8))}))
    assert not any(line.startswith("Best of") for line in lines)
    assert len(lines) <= 6


@pytest.mark.parametrize(
    ("overhead", "low", "high", "words"),
    [
        (0.25, None, None, "batch norm +25%"),
        (0.36, 0.3, 0.41, "batch norm +36% (+30% to +41% over seeds)"),
        (-0.09, -0.29, 0.11, "batch norm cannot be told (−29% to +11% over seeds)"),
        (0.01, -0.02, 0.04, "batch norm about the same (−2% to +4% over seeds)"),
    ],
)
def test_the_time_of_an_image_is_told_with_how_it_varied(overhead, low, high, words):
    changes = {"overhead": overhead, "overhead_low": low, "overhead_high": high}
    lines = verdict(with_arms(comparison_of(), {}, changes))
    text = next(line.text for line in lines if line.id == "verdict-cost")
    assert text.startswith(f"Training time for an image against no normalization: {words}, measured while")


def test_of_many_arms_the_ends_are_told_also_where_one_alone_is_known():
    comparison = comparison_of(seeds=3)
    (line,) = speed.cost(comparison, [comparison.arms[1]], few=False)
    assert re.search(r": from (\+\d+% \(batch norm\)) to \1, medians over seeds, measured while 2 trials", line.text)


def test_a_comparison_of_before_is_read():
    """`register` takes the winner of one that an earlier version has made."""
    tree = json.loads(comparison_of().model_dump_json(exclude_unset=True))
    for arm in tree["arms"]:
        del arm["had_target"]
        for name in ("overhead_low", "overhead_high"):
            arm.pop(name, None)
    assert best_arm(Comparison.model_validate(tree)).arm == "batch"
