"""A network of one's own after its training: exported where torch.export can follow it, and else said why not."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import mlflow
import pytest
import yaml

from pipeline.driver import train
from pipeline.serving import export
from pipeline.serving.result import ExportError

pytestmark = [pytest.mark.spark, pytest.mark.long]

REPOSITORY = Path(__file__).parents[2]
SOURCE = """from torch import nn


class Net(nn.Module):
    def __init__(self, image_shape, num_classes, branches=False):
        super().__init__()
        self.conv = nn.Conv2d(image_shape[0], 4, 3, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, num_classes)
        self.branches = branches

    def forward(self, x):
        if self.branches and x.mean() > 100:
            x = x / 2
        return self.head(self.norm(self.conv(x)).relu().mean((2, 3)))
"""


@pytest.fixture
def own(settings, tmp_path):
    """Settings of a network in a file of its own, which a session gets that was made without it."""
    path = tmp_path / f"served_{tmp_path.name.strip('_0123456789')[-8:]}.py"
    path.write_text(SOURCE)
    tree = settings.model_dump()
    tree["model"] = {"network": f"{path.stem}:Net", "norm": "batch"}
    tree["train"] |= {"epochs": 1}
    tree["spark"] = {"py_files": [str(path)]}
    tree["export"] = {"formats": ["pt2", "torchscript"]}
    yield tree
    sys.modules.pop(path.stem, None)
    sys.path[:] = [place for place in sys.path if place != str(tmp_path)]


def test_it_is_exported_by_a_process_that_has_only_the_settings(spark, settings, own, tmp_path):
    result = train(spark, type(settings).model_validate(own))
    assert result.steps > 5
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**own, "workers": {"count": 2}}))
    done = subprocess.run(
        [sys.executable, "-m", "pipeline", "export", "-c", str(tmp_path / "own.yaml")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 of 1 norm layers folded" in done.stderr
    assert Path(done.stdout.strip()).is_file()
    Path(own["spark"]["py_files"][0]).write_text(SOURCE + "# edited\n")
    with pytest.raises(ValueError, match="was changed since this Spark session got it, and Spark replaces no file"):
        train(spark, type(settings).model_validate(own))
    (tmp_path / "again").mkdir()
    again = shutil.copy(own["spark"]["py_files"][0], tmp_path / "again")
    own["spark"]["py_files"] = [*own["spark"]["py_files"], str(again)]
    with pytest.raises(ValueError, match=r"py_files: .* and .*/again/.* have one name, and executors keep one file"):
        train(spark, type(settings).model_validate(own))


def test_what_torch_export_cannot_follow_is_trained_and_the_rest_says_why_not(spark, settings, own, caplog, store_uri):
    own["model"] |= {"options": {"branches": True}, "norm": "keep"}
    settings = type(settings).model_validate(own)
    with caplog.at_level(logging.WARNING):
        result = train(spark, settings)
    assert result.final_accuracy > 0
    network = own["model"]["network"]
    assert f"{network} cannot be logged to MLflow, since torch.export cannot follow it: " in caplog.text
    assert mlflow.MlflowClient(store_uri).get_run(result.run_id).info.status == "FINISHED"
    with pytest.raises(ExportError, match=r"cannot be written as model.pt2: .*; leave pt2 out of export.formats"):
        export(settings)
