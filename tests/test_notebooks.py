"""Each notebook, run from top to bottom on real Spark, in order. Only what Databricks alone has is stood in for."""

import json
import shlex
from pathlib import Path

import pytest
from small_data import CLASSES

from pipeline.config import SettingsError, load_settings
from pipeline.driver import train
from pipeline.serving import export

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


class Widgets:
    """`dbutils.widgets`: a default at first, then what the person chose."""

    def __init__(self, chosen):
        self.chosen, self.values = chosen, {}

    def text(self, name, default, label):
        self.values[name] = self.chosen.get(name, default)

    def get(self, name):
        return self.values[name]


class Dbutils:
    def __init__(self, chosen):
        self.widgets = Widgets(chosen)


def run(name, spark, chosen):
    """Execute a notebook's cells; what it shows a person."""
    source = (NOTEBOOKS / name).read_text()
    assert source.startswith("# Databricks notebook source\n# MAGIC %md\n# MAGIC # ")
    shown = []
    names = {"spark": spark, "dbutils": Dbutils(chosen), "displayHTML": shown.append, "display": shown.append}
    for number, cell in enumerate(source.split("# COMMAND ----------")):
        exec(compile(cell, f"{name} cell {number}", "exec"), names)
    return names, shown


@pytest.mark.spark
def test_from_files_to_report(spark, idx_folder, tmp_path):
    overrides = {
        "output": f"'{tmp_path}/runs of mine'",
        "dataset.path": tmp_path / "data",
        "dataset.source.kind": "idx",
        "dataset.source.path": idx_folder,
        "dataset.source.classes": f"[{','.join(CLASSES)}]",
        "dataset.row_group_rows": 30,
        "dataset.validation_share": 0.2,
        "model.width": 4,
        "train.lanes": 4,
        "train.batch_size": 32,
        "train.epochs": 1,
        "train.learning_rate": "0.1",
        "compare.seeds": "'[0, 1]'",
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "tracking.artifacts": tmp_path / "artifacts",
    }
    chosen = {
        "config": str(NOTEBOOKS.parent / "conf" / "quickstart.yaml"),
        "overrides": " ".join(f"{key}={value}" for key, value in overrides.items()),
    }
    names, shown = run("01_ingest.py", spark, chosen)
    assert names["result"].written
    assert {row.split: row.rows for row in shown[0].collect()} == names["result"].rows
    names, shown = run("02_train.py", spark, chosen)
    result = names["result"]
    assert result.steps > 0
    assert shown[0].count() == len(result.curve)
    assert json.loads(Path(tmp_path, "runs of mine", "train.json").read_text())["run_id"] == result.run_id
    # The notebook's training is the one that the command line knows.
    exported = export(load_settings(chosen["config"], [*shlex.split(chosen["overrides"]), "export.formats=[pt2]"]))
    assert (exported.mlflow_run, exported.checkpoint) == (result.run_id, result.checkpoint)
    names, shown = run("03_compare.py", spark, chosen)
    assert {arm.arm for arm in names["comparison"].arms} == {"none", "batch"}
    assert shown[0].lstrip().startswith("<!doctype html>")
    # The fourth: a search, its best training as the champion of a registered model, and that model's scores.
    search = {"output": f"'{tmp_path}/tuned'", "tune.trials": 2, "tune.confirm": 0, "train.evaluations_per_epoch": 1}
    search |= {"tune.space": "'{model.norm: [none, batch]}'"}
    tuned = {**overrides, **search, "train.epochs": 2}
    del tuned["compare.seeds"]
    fourth = {
        "config": str(NOTEBOOKS.parent / "conf" / "tune.yaml"),
        "overrides": " ".join(f"{key}={value}" for key, value in tuned.items()),
        "model": "halves",
    }
    names, shown = run("04_tune_register_score.py", spark, fourth)
    assert len(names["tuning"].trials) == 2
    assert (names["registration"].model, names["registration"].version) == ("halves", "1")
    assert names["registration"].origin.run_id == names["result"].run_id
    assert (names["scores"].model.name, names["scores"].images) == ("halves", 301)
    assert "halves, version 1" in shown[1]
    # The fifth: an own network as it is and with two norms, its file sent by the session that is there already.
    own = {"model.norm": "'[keep, group]'", "compare.seeds": "'[0]'", "train.learning_rate": "'[0.1]'"}
    chosen["overrides"] = " ".join(f"{key}={value}" for key, value in {**overrides, **own}.items())
    chosen |= {"files": str(NOTEBOOKS / "networks" / "my_network.py"), "options": "{width: 8}"}
    names, shown = run("05_your_network.py", spark, chosen)
    assert {arm.arm for arm in names["comparison"].arms} == {"keep", "group"}
    assert not any(run.diverged for run in names["comparison"].runs)
    assert "the network&#39;s own norms" in shown[0] or "the network's own norms" in shown[0]


def test_a_list_is_refused_in_the_words_of_the_command():
    """Of its values one training would take the first in silence."""
    config, override = str(NOTEBOOKS.parent / "conf" / "quickstart.yaml"), "model.norm=[none, batch]"
    with pytest.raises(SettingsError) as by_the_command:
        load_settings(config, [override], single_run=True)
    assert "model.norm lists ['none', 'batch'], which `compare` trains one by one" in str(by_the_command.value)
    refused = {
        "notebook": lambda: run("02_train.py", None, {"config": config, "overrides": f"'{override}'"}),
        "train": lambda: train(None, load_settings(config, [override])),
        "export": lambda: export(load_settings(config, [override])),
    }
    for call in refused.values():
        with pytest.raises(SettingsError) as error:
            call()
        assert f"{config}: {error.value}" == str(by_the_command.value)
    settings = load_settings(config)
    assert settings.compare.grid  # a grid of the comparison's own is none of its business
    settings.require_single_run()
    load_settings(config, [override]).with_values({"model.norm": "none"}).require_single_run()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.py")), ids=lambda path: path.name)
def test_defaults_point_at_a_file_that_is_there(path):
    dbutils = Dbutils({})
    cell = path.read_text().split("# COMMAND ----------")[1]
    exec(cell, {"dbutils": dbutils})
    assert (NOTEBOOKS / dbutils.widgets.get("config")).is_file()
    if "files" in dbutils.widgets.values:
        assert (NOTEBOOKS / dbutils.widgets.get("files")).is_file()


def test_there_are_five():
    names = ["01_ingest.py", "02_train.py", "03_compare.py", "04_tune_register_score.py", "05_your_network.py"]
    assert [path.name for path in sorted(NOTEBOOKS.glob("*.py"))] == names
