from pathlib import Path

import pytest

from pipeline.config import Settings, SettingsError, load_settings
from pipeline.config.settings import digest_of

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"


@pytest.mark.parametrize("path", sorted(QUICKSTART.parent.rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_file_loads(path):
    assert load_settings(path).name == path.stem


def test_overrides_reach_every_level():
    settings = load_settings(QUICKSTART, ["train.epochs=7", "compare.seeds=[3, 4]", "train.augment.shift=2"])
    assert (settings.train.epochs, settings.compare.seeds, settings.train.augment.shift) == (7, (3, 4), 2)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epocs=3", ["train.epocs", "did you mean train.epochs"]),
        ("trian.epochs=3", ["unknown setting trian", "did you mean train"]),
        ("train.augment.flp=true", ["train.augment.flp", "did you mean train.augment.flip"]),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "got 0"]),
        ("train.epochs=many", ["train.epochs", "integer", "'many'"]),
        ("train.batch_size=250", ["batch_size 250", "lanes 16", "use 256"]),
        ("workers.count=3", ["workers.count 3", "train.lanes 16", "[1, 2, 4, 8, 16]"]),
        ("workers.device=tpu", ["workers.device", "'auto', 'cpu' or 'cuda'"]),
        ("train.learning_rate=[0.1, -1]", ["train.learning_rate", "greater than 0", "got -1"]),
        ("model.nrm=[none, batch]", ["unknown setting model.nrm", "did you mean model.norm"]),
        ("compare.grid.model.nrm=[a]", ["compare cannot vary 'model.nrm'", "did you mean model.norm"]),
        ("compare.grid.dataset.path=[a]", ["cannot vary 'dataset.path'", "model, train, reader, workers"]),
        ("compare.grid.train.augment=[1]", ["cannot vary 'train.augment'"]),
        ("compare.tune=[train.rate]", ["cannot vary 'train.rate'"]),
        ("compare.grid=3", ["compare.grid", "dictionary"]),
        ("train.seed=[1, 2]", ["train.seed cannot vary", "compare.seeds"]),
        ("model.norm=[group, group]", ["model.norm lists a value twice"]),
        ("workers.count=[1, 3]", ["workers.count=3", "does not divide train.lanes 16"]),
        ("compare.seeds=[1, 1]", ["seeds", "twice"]),
        ("dataset.source.kind=idx", ["kind: idx needs", "classes"]),
        ("epochs", ["write section.key=value"]),
        ("name.first=x", ["name is a value, not a section"]),
    ],
)
def test_a_bad_setting_is_one_error_that_names_it(override, words):
    with pytest.raises(SettingsError) as error:
        load_settings(QUICKSTART, [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nothing\.yaml: no such settings file"):
        load_settings(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(SettingsError, match=r"broken\.yaml is not YAML"):
        load_settings(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(SettingsError, match=r"list\.yaml: expected sections"):
        load_settings(tmp_path / "list.yaml")


def test_settings_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        Settings(name="x").train.epochs = 3


def test_digest_depends_on_values_and_not_on_order():
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert digest_of(Settings(name="x")) != digest_of(Settings(name="y"))


def test_the_name_of_a_reader_is_short_for_its_section():
    short = load_settings(QUICKSTART, ["reader=petastorm"]).reader
    assert short.kind == "petastorm"
    assert short == load_settings(QUICKSTART, ["reader.kind=petastorm"]).reader
    with pytest.raises(SettingsError, match=r"reader.kind: .*'arrow' or 'petastorm'"):
        load_settings(QUICKSTART, ["reader=parquet"])
