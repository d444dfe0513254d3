"""`tune.space` in its forms, what extends and overrides make of it, and what is refused."""

import pytest
import yaml

from pipeline.config import SettingsError, load_settings
from pipeline.config.effective import effective_yaml
from pipeline.config.settings import Settings
from pipeline.config.tune import Parameter, ordered

SPACE = {
    "model.norm": ["none", "batch"],
    "train.learning_rate": {"low": 0.01, "high": 0.5, "log": True},
    "model.norm_eps": {"low": 1e-6, "high": 1e-2, "log": True, "when": {"model.norm": "batch"}},
}


def write(path, **tree):
    path.write_text(yaml.safe_dump({"name": "x", **tree}, sort_keys=False))
    return path


def loaded(tmp_path, *overrides, **tune):
    return load_settings(write(tmp_path / "x.yaml", tune={"space": SPACE, **tune}), overrides)


def test_a_list_a_range_and_a_condition(tmp_path):
    space = loaded(tmp_path).tune.space
    assert list(space) == list(SPACE)
    assert space["model.norm"].choices == ("none", "batch")
    assert space["train.learning_rate"].words == "0.01 to 0.5 (log)"
    assert space["model.norm_eps"].when == {"model.norm": ("batch",)}
    assert space["model.norm_eps"].words == "1e-06 to 0.01 (log) where model.norm is batch"


def test_sections_may_be_nested_and_dotted_keys_may_name_a_field(tmp_path):
    nested = {
        "model": {"norm": ["none", "batch"], "norm_eps": {"low": 1e-6, "high": 1e-2, "log": True,
                                                          "when": {"model": {"norm": ["batch"]}}}},
        "train.learning_rate.low": 0.01, "train.learning_rate.high": 0.5, "train.learning_rate.log": True,
    }  # fmt: skip
    read = load_settings(write(tmp_path / "nested.yaml", tune={"space": nested})).tune.space
    assert read == loaded(tmp_path).tune.space


def test_words_that_yaml_1_1_takes_for_booleans_are_values(tmp_path):
    space = loaded(tmp_path, "tune.space.model.norm_scale=[learned, off]").tune.space
    assert space["model.norm_scale"].choices == ("learned", "off")


def test_an_override_replaces_a_bound_or_the_whole(tmp_path):
    low = loaded(tmp_path, "tune.space.train.learning_rate.low=0.1").tune.space["train.learning_rate"]
    assert (low.low, low.high, low.log) == (0.1, 0.5, True)
    listed = loaded(tmp_path, "tune.space.train.learning_rate=[0.1, 0.2]").tune.space["train.learning_rate"]
    assert (listed.choices, listed.low) == ((0.1, 0.2), None)
    ranged = loaded(
        tmp_path,
        "tune.space.train.learning_rate=[0.1]",
        "tune.space.train.learning_rate={low: 0.3, high: 0.4}",
    ).tune.space["train.learning_rate"]
    assert (ranged.choices, ranged.low, ranged.log) == (None, 0.3, False)


def test_a_file_that_extends_another_adds_parameters_and_replaces_them(tmp_path):
    loaded(tmp_path)
    space = {"train.learning_rate": [0.1], "train.weight_decay": [0.0, 0.001]}
    path = tmp_path / "more.yaml"
    path.write_text(yaml.safe_dump({"extends": "x.yaml", "tune": {"space": space}}))
    read = load_settings(path).tune.space
    assert set(read) == {*SPACE, "train.weight_decay"}
    assert read["train.learning_rate"].choices == (0.1,)


def test_an_option_of_an_own_network_may_have_the_name_of_a_field():
    settings = Settings.model_validate(
        {
            "name": "x",
            "model": {"network": "nets:build"},
            "tune": {"space": {"model.options.step": [1, 2], "model.options.low": {"low": 1, "high": 2}}},
        }
    )
    assert settings.tune.space["model.options.step"].choices == (1, 2)
    assert settings.tune.space["model.options.low"].low == 1


def test_the_whole_file_is_read_back(tmp_path):
    settings = loaded(tmp_path, "tune.space.train.epochs={low: 2, high: 8, step: 2, int: true}")
    path = tmp_path / "effective.yaml"
    path.write_text(effective_yaml(settings))
    assert load_settings(path) == settings


def test_settings_of_a_trial_have_no_space_left(tmp_path):
    made = loaded(tmp_path).with_values({"train.learning_rate": 0.3})
    assert made.tune.space == {}
    assert made.train.learning_rate == 0.3


def test_parameters_come_after_those_that_their_conditions_are_on():
    later = {
        "a": Parameter(choices=(1,), when={"b": (1,)}),
        "b": Parameter(choices=(1, 2)),
        "c": Parameter(choices=(1,)),
    }
    assert ordered(later) == ["b", "a", "c"]


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"train.lerning_rate": [1]}, "tune cannot vary 'train.lerning_rate'; did you mean train.learning_rate"),
        ({"tracking.uri": ["a"]}, "tune cannot vary 'tracking.uri': settings of model, train, reader, workers can"),
        ({"train.learning_rate": 0.1}, "train.learning_rate is 0.1: write a list of values, or a range"),
        ({"train.learning_rate": []}, "choices has no values"),
        ({"train.learning_rate": [0.1, 0.1]}, "choices has a value twice"),
        ({"train.learning_rate": {"low": 0.1}}, "write a list of values, or a range with low and high"),
        ({"train.learning_rate": {"low": 1, "high": 0.1}}, "low 1 is not below high 0.1"),
        ({"train.learning_rate": {"low": 0, "high": 1, "log": True}}, "log needs a low above 0, got 0"),
        ({"train.learning_rate": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "log and step exclude each other"),
        ({"train.learning_rate": {"choices": [1], "low": 0.1}}, "choices and a range"),
        ({"train.learning_rate": {"low": 0.1, "hihg": 1}}, "hihg"),
        ({"train.seed": [0, 1]}, "tune cannot choose train.seed"),
        ({"train.evaluate_on": ["test"]}, "tune cannot choose train.evaluate_on"),
        ({"train.batch_size": [16], "train.rank_batch_size": [16]}, "which both say the batch size|that both say"),
        ({"model.norm_eps": {"choices": [1e-5], "when": {"model.norm": "batch"}}}, "model.norm, which is not in"),
        (
            {"train.momentum": {"low": 0.1, "high": 0.9},
             "model.norm_eps": {"choices": [1e-5], "when": {"train.momentum": 0.5}}},
            "train.momentum, which is a range",
        ),
        (
            {"model.norm": ["none", "batch"], "model.norm_eps": {"choices": [1e-5], "when": {"model.norm": "group"}}},
            "it is for model.norm = group, which is not among its values",
        ),
        (
            {"model.norm": {"choices": ["batch"], "when": {"model.depth": 2}},
             "model.depth": {"choices": [2], "when": {"model.norm": "batch"}}},
            "conditions of model.norm, model.depth are on each other in a circle",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_searched_is_one_error(tmp_path, space, message):
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(write(tmp_path / "x.yaml", tune={"space": space}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("tune", "message"),
    [
        ({"trials": None}, "trials, seconds and images are all null, and the search would not end"),
        ({"sampler": "grid"}, "train.learning_rate is a range without step, which sampler grid cannot go through"),
        ({"search_on": "test"}, "tune.search_on and train.evaluate_on are both 'test'"),
        ({"confirm_seeds": [0]}, "tune.confirm_seeds has 0, which is train.seed"),
        ({"confirm_seeds": [1, 1]}, "confirm_seeds has a seed twice"),
    ],
)
def test_settings_of_the_search_that_cannot_be_right(tmp_path, tune, message):
    with pytest.raises(SettingsError, match=message):
        loaded(tmp_path, **tune)


def test_cmaes_needs_two_ranges_that_every_trial_has(tmp_path):
    two = {"train.momentum": {"low": 0.1, "high": 0.9}}
    assert loaded(tmp_path, sampler="cmaes", space={**SPACE, **two}).tune.sampler == "cmaes"
    with pytest.raises(SettingsError, match="sampler cmaes searches two ranges without a condition or more, and space "
                       "has 1: choose sampler tpe"):  # fmt: skip
        loaded(tmp_path, sampler="cmaes")
