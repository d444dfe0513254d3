"""Files that extend others, and that state only what differs."""

from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.config import Settings, SettingsError, load_settings, yaml_text
from pipeline.config.dotted import leaves

CONF = Path(__file__).parents[2] / "conf"
STUDIES = sorted([*CONF.glob("*.yaml"), *CONF.glob("study/*.yaml")])


def write(folder, **files):
    for name, text in files.items():
        path = folder / f"{name.replace('__', '/')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_sections_are_merged_and_values_and_lists_replaced(tmp_path):
    write(
        tmp_path,
        base="name: base\ntrain: {epochs: 9, augment: {flip: true, shift: 3}}\ncompare: {seeds: [0, 1, 2]}\n"
        "spark: {conf: {spark.a: 1, spark.b: 2}}",
        study="extends: base.yaml\nname: study\ntrain: {augment: {shift: 1}}\ncompare: {seeds: [7]}\n"
        "spark: {conf: {spark.b: 3}}",
    )
    settings = load_settings(tmp_path / "study.yaml", ["train.lanes=8"])
    assert (settings.name, settings.train.epochs, settings.train.lanes) == ("study", 9, 8)
    assert (settings.train.augment.flip, settings.train.augment.shift) == (True, 1)
    assert settings.compare.seeds == (7,)
    assert settings.spark.conf == {"spark.a": "1", "spark.b": "3"}


def test_a_file_may_extend_one_that_extends_another_each_from_its_own_folder(tmp_path, monkeypatch):
    write(
        tmp_path,
        shared__data="dataset: {seed: 5}",
        base="extends: shared/data.yaml\nmodel: {depth: 7}",
        studies__one="extends: ../base.yaml\nname: one",
    )
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    settings = load_settings("../studies/one.yaml")
    assert (settings.name, settings.model.depth, settings.dataset.seed) == ("one", 7, 5)


def test_one_value_leaves_nothing_to_vary_of_what_the_other_file_varies(tmp_path):
    write(
        tmp_path,
        base="name: base\ncompare: {grid: {model.norm: [none, batch], model.depth: [2, 3]}}",
        study="extends: base.yaml\nmodel: {norm: group}",
    )
    settings = load_settings(tmp_path / "study.yaml")
    assert settings.model.norm == "group"
    assert settings.compare.grid == {"model.depth": (2, 3)}


def test_a_short_reader_and_a_whole_one_are_merged(tmp_path):
    write(tmp_path, base="name: x\nreader: petastorm", study="extends: base.yaml\nreader: {threads: 5}")
    reader = load_settings(tmp_path / "study.yaml").reader
    assert (reader.kind, reader.threads) == ("petastorm", 5)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: nowhere.yaml", ["a.yaml: extends nowhere.yaml, and there is no such file in"]),
        ("extends: [b.yaml]", ["a.yaml: extends: write the path of one other file, got ['b.yaml']"]),
        ("extends:", ["a.yaml: extends: write the path of one other file, got None"]),
        ("extends: a.yaml", ["a.yaml: extends a.yaml in a circle"]),
        ("extends: b.yaml", ["b.yaml: extends sub/../a.yaml in a circle", "a.yaml -> ", "b.yaml -> "]),
        ("extends: broken.yaml", ["broken.yaml is not YAML"]),
        ("extends: wrong.yaml", ["a.yaml: unknown setting trian; did you mean train?"]),
        ("extends: c.yaml", ["a.yaml: setting name is missing"]),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path, text, words):
    (tmp_path / "sub").mkdir()
    write(tmp_path, a=text, b="extends: sub/../a.yaml", broken="name: [", wrong="name: x\ntrian: {}", c="output: x")
    with pytest.raises(SettingsError) as error:
        load_settings(tmp_path / "a.yaml")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_line_of_a_shipped_file_changes_something(path, tmp_path):
    """A file states what differs from the defaults, or from the file that it extends, and nothing else."""
    tree = yaml_text.read(path.read_text())
    if "extends" in tree:
        tree["extends"] = str((path.parent / tree["extends"]).resolve())
    whole = load_settings(path)
    names = [name for name, _ in leaves(tree) if name != "name"]
    assert len(names) > 5
    for name in names:
        (tmp_path / "without.yaml").write_text(yaml_text.write(without(tree, name)))
        with suppress(SettingsError):  # it cannot be left out
            assert load_settings(tmp_path / "without.yaml") != whole, f"{name} could be left out"


def without(tree, name, prefix=""):
    return {
        key: without(value, name, f"{prefix}{key}.") if isinstance(value, dict) else value
        for key, value in tree.items()
        if f"{prefix}{key}" != name
    }


def test_the_shared_dataset_is_one():
    shared = [load_settings(path).dataset for path in STUDIES if "extends: " in path.read_text()]
    of_all = {"path": "runs/datasets/fashion_mnist_all", "validation_share": 0.0}
    assert len(shared) == 5
    assert sum(dataset == shared[-1] for dataset in shared) == 4
    assert shared[-1].model_copy(update=of_all) in shared
    assert shared[-1] != Settings(name="x").dataset
