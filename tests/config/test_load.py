from pathlib import Path

import fsspec
import pytest

from pipeline.config import SettingsError, load_settings

QUICKSTART = Path(__file__).parents[2] / "conf" / "quickstart.yaml"
STUDIES = sorted([*QUICKSTART.parent.glob("*.yaml"), *QUICKSTART.parent.glob("study/*.yaml")])


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
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
        ("train.epochs=many", ["train.epochs: Input should be 'auto' or a valid integer", "got 'many'"]),
        ("train.batch_size=many", ["train.batch_size: Input should be 'auto' or a valid integer", "got 'many'"]),
        ("train.batch_size=0", ["train.batch_size: Input should be 'auto' or greater than or equal to 1, got 0"]),
        ("train.warmup_epochs=few", ["train.warmup_epochs: Input should be 'auto' or a valid number", "got 'few'"]),
        ("train.epochs=[4, many]", ["train.epochs: Input should be 'auto' or a valid integer", "got 'many'"]),
        ("train.batch_size=250", ["batch_size 250", "lanes 16", "use 256"]),
        ("workers.count=3", ["workers.count 3", "train.lanes 16", "[1, 2, 4, 8, 16]"]),
        ("workers.device=tpu", ["workers.device", "'auto', 'cpu' or 'cuda'"]),
        ("train.learning_rate=[0.1, -1]", ["train.learning_rate", "greater than 0", "got -1"]),
        ("model.nrm=[none, batch]", ["unknown setting model.nrm", "did you mean model.norm"]),
        ("compare.grid.model.nrm=[a]", ["compare cannot vary 'model.nrm'", "did you mean model.norm"]),
        ("compare.grid.dataset.path=[a]", ["cannot vary 'dataset.path'", "model, train, reader, workers"]),
        ("compare.grid.train.augment=[1]", ["cannot vary 'train.augment'"]),
        ("compare.tune=[train.rate]", ["cannot vary 'train.rate'"]),
        ("compare.grid=3", ["compare.grid", "a mapping", "got 3"]),
        ("train.seed=[1, 2]", ["train.seed cannot vary", "compare.seeds"]),
        ("train.evaluate_on=[test, validation]", ["train.evaluate_on cannot vary: arms are compared on one split"]),
        ("compare.grid.train.evaluate_on=[validation]", ["train.evaluate_on cannot vary", "beside the grid"]),
        ("compare.tune=[train.evaluate_on]", ["train.evaluate_on cannot vary"]),
        ("model.norm=[group, group]", ["model.norm lists a value twice"]),
        ("train.learning_rate=[1, 1.0]", ["train.learning_rate lists a value twice"]),
        ("compare.seeds=[-1, 0]", ["compare: seeds has -1: a seed is 0 or more"]),
        ("tune.confirm_seeds=[-1]", ["tune: confirm_seeds has -1: a seed is 0 or more"]),
        ("workers.count=[1, 3]", ["workers.count=3", "does not divide train.lanes 16"]),
        (
            "compare.seeds=[0, 70368744177665]",
            ["compare: seeds has 70368744177665: a seed is 0 or more, and at most 70368744177664"],
        ),
        ("tune.confirm_seeds=[70368744177665]", ["tune: confirm_seeds has 70368744177665: a seed is 0 or more"]),
        ("compare.search_seed=70368744177664", ["compare.search_seed", "less than or equal to 70368743129088"]),
        ("compare.seeds=[1, 1]", ["seeds", "twice"]),
        ("dataset.source.kind=idx", ["kind: idx needs", "classes"]),
        ("epochs", ["override 'epochs': write the setting, an equals sign and its value"]),
        ("learning_rate=0.1", ["unknown setting learning_rate; did you mean train.learning_rate?"]),
        ("train.lr=0.1", ["unknown setting train.lr; `sparknorm settings`"]),
        ("compare.seeds=3", ["compare.seeds: Input should be 'auto' or a list, such as [a, b], got 3"]),
        ("dataset.image.shape=64", ["dataset.image.shape: Input should be a list, such as [a, b], got 64"]),
        ("dataset.image.shape=[3, 64]", ["setting dataset.image.shape.2 is missing in [3, 64]"]),
        ("model=resnet", ["model: Input should be a section, got 'resnet'"]),
        (
            "train.augment.flip=ja",
            ["train.augment.flip: Input should be a valid boolean", "or 'alternating', got 'ja'"],
        ),
        ("compare.grid.path=[a]", ["compare cannot vary 'path': settings of model, train"]),
        ("name.first=x", ["name is a value, not a section"]),
    ],
)
def test_a_bad_setting_is_one_error_that_names_it(override, words):
    with pytest.raises(SettingsError) as error:
        load_settings(QUICKSTART, [override])
    assert all(word in str(error.value) for word in words), str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_file_at_a_url_such_as_a_search_leaves_it(tmp_path):
    url, text = "memory://settings/best.yaml", "name: best\ntrain: {epochs: 3}\n"
    fsspec.filesystem("memory").pipe(url, text.encode())
    (tmp_path / "best.yaml").write_text(text)
    assert load_settings(url, ["train.seed=7"]) == load_settings(tmp_path / "best.yaml", ["train.seed=7"])
    with pytest.raises(SettingsError, match=r"^memory://settings/b\[e\]st\.yaml: no such settings file$"):
        load_settings("memory://settings/b[e]st.yaml")
    with pytest.raises(SettingsError, match=r"^memory://settings/a::best\.yaml has :: in it"):
        load_settings("memory://settings/a::best.yaml")
    with pytest.raises(SettingsError, match=r"^memory://settings/none\.yaml: no such settings file$"):
        load_settings("memory://settings/none.yaml")
    with pytest.raises(SettingsError, match=r"^nowhere://a/best\.yaml cannot be read: Protocol not known: nowhere$"):
        load_settings("nowhere://a/best.yaml")
    fsspec.filesystem("memory").pipe(url, b"extends: default.yaml\n")
    with pytest.raises(SettingsError, match=r"extends default\.yaml: a file at a URL cannot; put both on a local disk"):
        load_settings(url)


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nothing\.yaml: no such settings file"):
        load_settings(tmp_path / "nothing.yaml")
    (tmp_path / "broken.yaml").write_text("name: [")
    with pytest.raises(SettingsError, match=r"broken\.yaml is not YAML"):
        load_settings(tmp_path / "broken.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(SettingsError, match=r"list\.yaml: expected sections"):
        load_settings(tmp_path / "list.yaml")


def test_the_name_of_a_reader_is_short_for_its_section():
    short = load_settings(QUICKSTART, ["reader=petastorm"]).reader
    assert short.kind == "petastorm"
    assert short == load_settings(QUICKSTART, ["reader.kind=petastorm"]).reader
    with pytest.raises(SettingsError, match=r"reader.kind: .*'arrow' or 'petastorm'"):
        load_settings(QUICKSTART, ["reader=parquet"])


@pytest.mark.parametrize(
    ("override", "name", "value"),
    [
        ("reader.verify=off", "reader.verify", "off"),
        ("model.norm_scale=off", "model.norm_scale", "off"),
        ("export.fold=off", "export.fold", False),
        ("export.fold=false", "export.fold", False),
        ("export.fold=true", "export.fold", True),
        ("train.bf16=yes", "train.bf16", True),
        ("train.learning_rate=1e-3", "train.learning_rate", 1e-3),
        ("tracking.experiment=off", "tracking.experiment", "off"),
        ("spark.conf.spark.executor.memory=4g", "spark.conf", {"spark.executor.memory": "4g"}),
        ("spark.conf.spark.executor.cores=4", "spark.conf", {"spark.executor.cores": "4"}),
        ("spark.conf.spark.speculation=true", "spark.conf", {"spark.speculation": "true"}),
        ("spark.conf.spark.version=3.10", "spark.conf", {"spark.version": "3.10"}),
        ("spark.conf={spark.a: 1e-3, spark: {b: on}}", "spark.conf", {"spark.a": "1e-3", "spark.b": "on"}),
    ],
)
def test_values_as_people_write_them(override, name, value, tmp_path):
    key, _, text = override.partition("=")
    *sections, last = ["spark", "conf", key.removeprefix("spark.conf.")] if "conf." in key else key.split(".")
    opened = "".join(f"{'  ' * depth}{section}:\n" for depth, section in enumerate(sections))
    (tmp_path / "study.yaml").write_text(f"name: x\n{opened}{'  ' * len(sections)}{last}: {text}\n")
    for settings in (load_settings(QUICKSTART, [override]), load_settings(tmp_path / "study.yaml")):
        section, _, field = name.partition(".")
        assert getattr(getattr(settings, section), field) == value


def test_lists_may_contain_off(tmp_path):
    assert load_settings(QUICKSTART, ["model.norm_scale=[learned,off]"]).compare.grid["model.norm_scale"] == (
        "learned", "off",
    )  # fmt: skip
    (tmp_path / "study.yaml").write_text("name: x\nmodel:\n  norm_shift: [off, fixed]\n  norm_scale: off\n")
    settings = load_settings(tmp_path / "study.yaml")
    assert settings.model.norm_scale == settings.model.norm_shift == "off"
    assert settings.compare.grid == {"model.norm_shift": ("off", "fixed")}


def test_properties_of_spark_whose_names_begin_alike_stand_side_by_side():
    overrides = ["spark.conf.spark.speculation=true", "spark.conf.spark.speculation.quantile=0.9"]
    assert load_settings(QUICKSTART, [*overrides, "spark.conf.spark.speculation=false"]).spark.conf == {
        "spark.speculation": "false", "spark.speculation.quantile": "0.9",
    }  # fmt: skip


def test_properties_of_spark_that_are_no_single_value_are_refused():
    with pytest.raises(SettingsError, match=r"spark\.conf\.spark\.a: .*valid string"):
        load_settings(QUICKSTART, ["spark.conf.spark.a=[1, 2]"])


def test_values_of_the_grid_take_the_place_of_a_list_in_the_settings_own(tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("name: x\nmodel: {norm: [none, batch], depth: 3}\n")
    assert load_settings(study).compare.grid == {"model.norm": ("none", "batch")}
    for override in ("compare.grid.model.norm=[group, batch]", "compare.grid={model: {norm: [group, batch]}}",
                     "compare={grid: {model.norm: [group, batch]}}", "model.norm=[group, batch]"):  # fmt: skip
        settings = load_settings(study, [override])
        assert settings.compare.grid == {"model.norm": ("group", "batch")}, override
        assert settings.model.norm == "group"
        with pytest.raises(
            SettingsError, match=r"model.norm lists \['group', 'batch'\], which `compare` trains one by"
        ):
            load_settings(study, [override], single_run=True)
    one_more = load_settings(study, ["compare.grid.model.depth=[2, 4]"])
    assert one_more.compare.grid == {"model.depth": (2, 4), "model.norm": ("none", "batch")}
    assert load_settings(study, ["compare.grid.model.norm=[group]", "model.norm=batch"]).compare.grid == {}
    with pytest.raises(SettingsError, match=r"compare.grid.model.norm: .* a list, such as .*, got 'batch'"):
        load_settings(study, ["compare.grid.model.norm=batch"])


def test_a_file_lists_the_values_of_a_setting_once(tmp_path):
    study = tmp_path / "study.yaml"
    study.write_text("name: x\nmodel: {norm: [none, batch]}\ncompare: {grid: {model.norm: [none, group]}}\n")
    with pytest.raises(
        SettingsError, match=r"study.yaml: model.norm lists values in its own place and in compare.grid"
    ):
        load_settings(study)
    study.write_text("name: x\nmodel: {norm: [none, batch]}\ncompare: {grid: {model.norm: [none, batch]}}\n")
    assert load_settings(study).compare.grid == {"model.norm": ("none", "batch")}
    (tmp_path / "later.yaml").write_text("extends: study.yaml\ncompare: {grid: {model.norm: [group, none]}}\n")
    assert load_settings(tmp_path / "later.yaml").compare.grid == {"model.norm": ("group", "none")}
