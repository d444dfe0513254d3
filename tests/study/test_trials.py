"""The trainings of a study."""

from pathlib import Path

import pytest

from pipeline.config import load_settings
from pipeline.report.comparison import SearchTrial
from pipeline.study.arms import arms_of, candidates_of
from pipeline.study.trials import best_of, compared_trials, search_trials

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"


def load(*overrides):
    return load_settings(QUICKSTART, ("model.norm=[none, batch]", "train.learning_rate=[0.1, 0.2]", *overrides))


def test_arms_differ_in_the_settings_varied_alone():
    study = load("model.depth=[2, 3]", "compare.seeds=[7]")
    arms = arms_of(study)
    trials = compared_trials(study, arms, [{"train.learning_rate": 0.2}], [])
    trees = [trial.settings.model_dump() for trial in trials]
    assert len(trees) == 4
    for tree, arm in zip(trees, arms, strict=True):
        assert (tree["model"].pop("norm"), tree["model"].pop("depth")) == tuple(arm.values.values())
    assert all(tree == trees[0] for tree in trees)
    assert (trees[0]["train"]["seed"], trees[0]["train"]["learning_rate"]) == (7, 0.2)


def test_every_arm_is_trained_with_every_seed_one_seed_after_the_other():
    study = load("compare.seeds=[3, 4]")
    trials = compared_trials(study, arms_of(study), [{}], [])
    assert [(trial.arm.name, trial.settings.train.seed) for trial in trials] == [
        ("none", 3), ("batch", 3), ("none", 4), ("batch", 4),
    ]  # fmt: skip
    assert trials[1].name == "quickstart batch seed=3"
    assert trials[1].tags == {"kind": "arm", "arm": "batch", "seed": 3, "norm": "batch"}


@pytest.mark.parametrize(("warmup", "expected"), [(3.0, 0.5), (0.25, 0.25), (0.0, 0.0)])
def test_a_trial_of_the_search_reaches_the_rate_that_it_tries(warmup, expected):
    study = load("train.epochs=4", f"train.warmup_epochs={warmup}", "compare.search_epochs=1")
    trials = search_trials(study, arms_of(study), candidates_of(study))
    assert [trial.settings.train.learning_rate for trial in trials] == [0.1, 0.2] * 2
    for trial in trials:
        short = trial.settings.train
        assert (short.warmup_epochs, short.epochs) == (expected, 1)
        assert (short.evaluate_on, short.seed) == ("validation", study.compare.search_seed)


def test_there_is_no_search_where_there_is_nothing_to_choose():
    study = load("train.learning_rate=0.1")
    assert search_trials(study, arms_of(study), candidates_of(study)) == []


def tried(rate, accuracy, *, diverged=False):
    return SearchTrial.model_construct(
        arm="none", tuned={"train.learning_rate": rate}, best_accuracy=accuracy, diverged=diverged
    )


def test_the_best_rate_is_taken_and_one_that_diverged_only_if_all_did():
    study = load()
    arm, candidates = arms_of(study)[0], candidates_of(study)
    assert best_of([tried(0.1, 0.8), tried(0.2, 0.9)], arm, candidates) == {"train.learning_rate": 0.2}
    assert best_of([tried(0.1, 0.8), tried(0.2, 0.9, diverged=True)], arm, candidates) == {"train.learning_rate": 0.1}
    fallen = [tried(0.1, 0.2, diverged=True), tried(0.2, 0.3, diverged=True)]
    assert best_of(fallen, arm, candidates) == {"train.learning_rate": 0.2}
