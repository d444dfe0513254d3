"""A network of one's own in settings: its name, its options, and what of them a study can vary."""

from pathlib import Path

import pytest

from pipeline.config import Settings, SettingsError, load_settings
from pipeline.config.dotted import is_in_free_mapping, is_setting
from pipeline.config.identity import identity_of

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
OWN = "model.network=mypackage.nets:build"


def load(*overrides):
    return load_settings(QUICKSTART, overrides)


def test_options_are_whatever_yaml_writes():
    options = {"width": 8, "stem": {"kernel": 3, "a.b": None}, "widths": [1, 2], "act": "off", "rate": 0.1}
    settings = load(OWN, "model.options={width: 8, stem: {kernel: 3, a.b: null}, widths: [1, 2], act: off, rate: 0.1}")
    assert settings.model.options == options
    settings = load(OWN, "model.options.width=8", "model.options.stem.kernel=3", "model.options.widths=[1, 2]")
    assert settings.model.options == {"width": 8, "stem": {"kernel": 3}, "widths": [1, 2]}
    assert "model.options.widths" not in settings.compare.grid  # a list is the value


def test_a_study_varies_options_by_its_grid():
    settings = load(OWN, "compare.grid={model: {options: {width: [8, 16], stem: {kernel: [3]}}}}")
    assert settings.compare.grid == {"model.options.width": (8, 16), "model.options.stem.kernel": (3,)}
    values = {"model.options.width": 16, "model.options.stem.kernel": 3}
    assert settings.with_values(values).model.options == {"width": 16, "stem": {"kernel": 3}}
    assert settings.model.options == {}


def test_networks_of_ours_get_no_options():
    settings = load("model.network=[cnn, mypackage.nets:build]", "model.options.width=8")
    assert settings.with_values({"model.network": "cnn"}).model.options == {}
    assert settings.with_values({"model.network": "mypackage.nets:build"}).model.options == {"width": 8}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["model.network=nets.py:build"],
            r"names a file, .*: write model.network=nets:build and spark.py_files=\[nets.py\]",
        ),
        (["model.network=src/nets.py:build"], r"write model.network=nets:build and spark.py_files=\[src/nets.py\]"),
        (["model.network=/tmp/nets.py:build"], r"write model.network=nets:build and spark.py_files=\[/tmp/nets.py\]"),
        (["model.network=a-b:build"], "'a-b:build' is no import path: write module:function"),
        (["model.network='nets:'"], "'nets:' is no import path"),
        (["model.options.width=8"], "model.options is for a network of your own, and model.network is cnn"),
        ([OWN, "model.options=8"], "model.options: Input should be a mapping, such as .*, got 8"),
        ([OWN, "model.depth=[2, 3]"], "compare cannot vary model.depth, which mypackage.nets:build does not get: vary"),
        (["model.network=[cnn, a:b]", "compare.grid.model.options.x=[1]"], "model.network=cnn.*: model.options is for"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_imported(overrides, words):
    with pytest.raises(SettingsError, match=words):
        load(*overrides)


def test_names_in_a_free_mapping_are_settings():
    assert is_setting(Settings, "model.options.anything.at.all")
    assert is_in_free_mapping(Settings, "model.options.a")
    for name in ("model.options", "model.depth", "compare.grid.model.norm", "x.y.z"):
        assert not is_in_free_mapping(Settings, name)


def test_no_options_are_no_part_of_an_identity_and_others_are():
    assert "options" not in identity_of("model", load().model)
    assert identity_of("model", load(OWN, "model.options.width=8").model)["options"] == {"width": 8}
