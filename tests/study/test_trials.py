"""The trainings of a study."""

from pathlib import Path

from pipeline.config import load_settings
from pipeline.study.arms import arms_of
from pipeline.study.trials import compared_trials

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"


def load(*overrides):
    return load_settings(QUICKSTART, ("model.norm=[none, batch]", "train.learning_rate=[0.1, 0.2]", *overrides))


def test_arms_differ_in_the_settings_varied_alone():
    study = load("model.depth=[2, 3]")
    arms = arms_of(study)
    trials = compared_trials(study, arms, {arm.name: {"train.learning_rate": 0.2} for arm in arms}, [7])
    trees = [trial.settings.model_dump() for trial in trials]
    assert len(trees) == 4
    for tree, arm in zip(trees, arms, strict=True):
        assert (tree["model"].pop("norm"), tree["model"].pop("depth")) == tuple(arm.values.values())
    assert all(tree == trees[0] for tree in trees)
    assert (trees[0]["train"]["seed"], trees[0]["train"]["learning_rate"]) == (7, 0.2)


def test_every_arm_is_trained_with_every_seed_one_seed_after_the_other():
    study = load()
    trials = compared_trials(study, arms_of(study), {"none": {}, "batch": {}}, [3, 4])
    assert [(trial.arm.name, trial.settings.train.seed) for trial in trials] == [
        ("none", 3), ("batch", 3), ("none", 4), ("batch", 4),
    ]  # fmt: skip
    assert trials[1].name == "quickstart batch seed=3"
    assert trials[1].tags == {"kind": "arm", "arm": "batch", "seed": 3, "norm": "batch"}


def test_each_arm_has_its_own_value_of_the_tuned_setting():
    study = load()
    tuned = {"none": {"train.learning_rate": 0.1}, "batch": {"train.learning_rate": 2.5}}  # also beyond the grid
    trials = compared_trials(study, arms_of(study), tuned, [0])
    assert [trial.settings.train.learning_rate for trial in trials] == [0.1, 2.5]
    assert [trial.tuned for trial in trials] == list(tuned.values())


def test_a_setting_whose_name_a_tag_has_already_replaces_none():
    study = load("reader.kind=[arrow, petastorm]")
    trial = compared_trials(study, arms_of(study)[1:2], {arm.name: {} for arm in arms_of(study)}, [3])[0]
    assert (trial.tags["kind"], trial.tags["seed"]) == ("arm", 3)
    options = ("model.network=mine.nets:build", "model.norm=keep", "compare.grid.model.options.name=[one, two]")
    study = load_settings(QUICKSTART, options)
    trial = compared_trials(study, arms_of(study)[:1], {arm.name: {} for arm in arms_of(study)}, [3])[0]
    assert "name" not in trial.tags
    assert trial.tags["model.options.name"] == "one"
