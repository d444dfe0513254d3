"""Pretrained weights through the commands: `train` says what was new, `compare` has weights and optimizers as arms."""

import json
import os
from pathlib import Path

import pytest
from small_halves import write_halves

from pipeline.driver.train import train
from pipeline.study.job import _find_record, compare
from pipeline.training.weights_file import WeightsError

pytestmark = pytest.mark.spark


def test_train_begins_with_a_checkpoint_of_another_dataset(spark, settings, tmp_path, capsys, monkeypatch):
    """Its path may be relative; what is wrong with the file is said before a run or a trial is begun."""
    first = settings.with_values({"dataset.path": write_halves(tmp_path / "three"), "workers.count": 1})
    checkpoint = train(spark, first).checkpoint
    monkeypatch.chdir(Path(checkpoint).parent)
    values = {
        "dataset.path": write_halves(tmp_path / "four", classes=4), "output": str(tmp_path / "tuned"),
        "model.weights": Path(checkpoint).name, "model.freeze": "features.0", "train.head_learning_rate": 0.3,
    }  # fmt: skip
    tuned = settings.with_values(values)
    result = train(spark, tuned)
    said = f"model.weights {checkpoint}: the head classifier is new: 4 classes here, 3 in the file"
    assert result.notes == (said,)
    assert json.loads((tmp_path / "tuned" / "train.json").read_text())["notes"] == [said]
    assert "the head classifier is new: 4 classes here, 3 in the file" in " ".join(capsys.readouterr().err.split())
    trials = sorted((tmp_path / "tuned" / "trials").iterdir())
    Path(checkpoint).write_bytes(Path(checkpoint).read_bytes()[:-1000])
    with pytest.raises(WeightsError, match="it is damaged, or no file of weights"):
        train(spark, tuned)
    assert sorted((tmp_path / "tuned" / "trials").iterdir()) == trials


@pytest.mark.slow
def test_weights_and_optimizers_are_arms_whose_rates_are_chosen(spark, settings, tmp_path, dataset):
    checkpoint = train(spark, settings).checkpoint
    grid = {
        "model.weights": [None, checkpoint], "train.optimizer": ["sgd", "lamb"], "train.learning_rate": [0.02, 0.1],
    }  # fmt: skip
    tree = settings.model_dump()
    tree["compare"] = {"grid": grid, "seeds": [0], "tune": ["train.learning_rate"]}
    study = type(settings).model_validate(tree)
    comparison = compare(spark, study)
    arms = {arm.arm: arm for arm in comparison.arms}
    assert len(arms) == 4
    assert all("optimizer" in name and "weights" in name for name in arms)
    assert not any(run.diverged for run in comparison.runs)
    folder = _find_record(study, _manifest(dataset)).folder
    os.utime(checkpoint, (0, 0))
    assert _find_record(study, _manifest(dataset)).folder.rpartition("-")[0] == folder.rpartition("-")[0]


def _manifest(path):
    from pipeline.data import load_manifest

    return load_manifest(path, None)
