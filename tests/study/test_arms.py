"""Lists of values -> arms and candidates, with the YAML files and overrides that people write."""

from pathlib import Path

import pytest

from pipeline.config import SettingsError, load_settings
from pipeline.study.arms import arms_of, candidates_of

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"


def load(*overrides, **options):
    return load_settings(QUICKSTART, overrides, **options)


def names(*overrides):
    return [arm.name for arm in arms_of(load(*overrides))]


def test_the_shipped_study_has_two_arms_that_choose_among_three_rates():
    settings = load()
    assert [(arm.name, arm.values, arm.settings.model.norm) for arm in arms_of(settings)] == [
        ("none", {"model.norm": "none"}, "none"), ("batch", {"model.norm": "batch"}, "batch"),
    ]  # fmt: skip
    assert candidates_of(settings) == [{"train.learning_rate": rate} for rate in (0.02, 0.1, 0.5)]


def test_every_combination_is_an_arm_and_the_first_values_are_the_baseline():
    assert names("model.depth=[2, 3]", "model.norm=[batch, group]") == [
        "batch, depth 2", "batch, depth 3", "group, depth 2", "group, depth 3",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "override", ["model.norm=[none, group]", "compare.grid.model.norm=[none, group]"], ids=["in place", "in the grid"]
)
def test_a_list_on_the_command_line_replaces_that_of_the_file(override):
    assert names(override) == ["none", "group"]


def test_one_value_on_the_command_line_leaves_nothing_to_vary():
    settings = load("model.norm=group", "train.learning_rate=0.3")
    assert [arm.name for arm in arms_of(settings)] == ["group"]
    assert candidates_of(settings) == [{}]
    assert arms_of(settings)[0].settings.train.learning_rate == 0.3


def test_a_setting_that_is_not_tuned_makes_arms_also_if_it_is_the_learning_rate():
    settings = load("model.norm=batch", "compare.tune=[]")
    assert [arm.name for arm in arms_of(settings)] == ["learning_rate 0.02", "learning_rate 0.1", "learning_rate 0.5"]
    assert candidates_of(settings) == [{}]


def test_several_settings_are_tuned_together():
    settings = load("compare.tune=[train.learning_rate, train.weight_decay]", "train.weight_decay=[0.0, 1.0e-3]")
    assert len(arms_of(settings)) == 2
    assert len(candidates_of(settings)) == 6


def test_the_batch_of_a_worker_is_held_when_workers_vary_and_that_of_all_if_it_was_given():
    by_rank = load("train.batch_size=null", "train.rank_batch_size=32", "workers.count=[1, 2]", "model.norm=batch")
    assert [(a.settings.workers.count, a.settings.train.global_batch) for a in arms_of(by_rank)] == [(1, 32), (2, 64)]
    of_all = load("train.batch_size=64", "workers.count=[1, 2]", "model.norm=batch")
    assert [(a.settings.workers.count, a.settings.train.global_batch) for a in arms_of(of_all)] == [(1, 64), (2, 64)]
    varied = load("compare.grid.train.rank_batch_size=[16, 32]", "model.norm=batch")  # the file gives batch_size
    assert [a.settings.train.global_batch for a in arms_of(varied)] == [32, 64]


def test_nothing_is_left_to_compare_in_an_arm():
    assert all(arm.settings.compare.grid == {} for arm in arms_of(load()))


def test_a_command_that_trains_once_wants_one_value():
    with pytest.raises(SettingsError, match=r"model\.norm lists \['none', 'batch'\].*choose one.*-o model\.norm=none"):
        load("model.norm=[none, batch]", single_run=True)
    assert load(single_run=True).model.norm == "batch"  # what `train` uses beside the grid of `compare`
    listed = load("model.norm=[none, batch]")
    with pytest.raises(SettingsError, match=r"^model\.norm lists \['none', 'batch'\]"):
        listed.require_single_run()
    for arm in arms_of(listed):
        arm.settings.require_single_run()


def test_values_that_do_not_fit_each_other_are_named_before_anything_runs():
    with pytest.raises(SettingsError, match=r"quickstart\.yaml: with .*workers\.count=8.*train\.lanes 4"):
        load("workers.count=[2, 8]", "train.lanes=[16, 4]")


def test_weights_by_class_make_an_arm_with_a_name():
    settings = load("model.norm=batch", "train.class_weights=[none, balanced, {shirt: 2, bag: 0.5}]")
    arms = arms_of(settings)
    assert [arm.name for arm in arms] == [
        "class_weights none",
        "class_weights balanced",
        "class_weights bag 0.5 shirt 2",
    ]
    assert arms[2].values == {"train.class_weights": "{bag: 0.5, shirt: 2}"}
    assert arms[2].settings.train.class_weights == {"shirt": 2.0, "bag": 0.5}


def test_arms_that_would_have_one_name_are_refused():
    weights = "train.class_weights=[{a: 1, b: 2, c: 3}, {'a 1 b': 2, c: 3}]"
    with pytest.raises(SettingsError, match=r"2 arms would be named 'class_weights a 1 b 2 c 3'.*rename a class"):
        arms_of(load("model.norm=batch", weights))
