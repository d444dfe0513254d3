"""The way of a cluster: spark-submit, separate executor processes, the packages only in the zip."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from small_data import CLASSES

pytestmark = [pytest.mark.spark, pytest.mark.long]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def zip_path():
    subprocess.run(["make", "-C", str(REPOSITORY), "dist"], check=True, timeout=300, capture_output=True)
    return REPOSITORY / "dist" / "sparknorm.zip"


@pytest.fixture
def python(tmp_path):
    """A Python that sees the installed dependencies but not this project: -S leaves out the editable install."""
    site = sysconfig.get_paths()["purelib"]
    path = tmp_path / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="$PYTHONPATH:{site}" exec "{sys.executable}" -S "$@"\n')
    path.chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run([path, "-c", "import pyspark, torch, pipeline"], cwd=tmp_path, env=env, capture_output=True,
                           text=True, timeout=60, check=False)  # fmt: skip
    assert "No module named 'pipeline'" in found.stderr
    return path


def submit(zip_path, python, cwd, *words):
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"PYSPARK_PYTHON": str(python), "PYSPARK_DRIVER_PYTHON": str(python), "SPARK_LOCAL_IP": "127.0.0.1"}
    command = [
        Path(sysconfig.get_path("scripts")) / "spark-submit", "--master", "local-cluster[2,1,1024]",
        "--properties-file", REPOSITORY / "conf" / "spark" / "local.conf",
        "--py-files", zip_path, REPOSITORY / "conf" / "spark" / "submit.py", *words,
    ]  # fmt: skip
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)


def test_ingest_and_train_on_a_local_cluster(zip_path, python, idx_folder, tmp_path):
    overrides = [
        f"dataset.path={tmp_path}/data",
        "dataset.source.kind=idx",
        f"dataset.source.path={idx_folder}",
        f"dataset.source.classes=[{','.join(CLASSES)}]",
        "dataset.row_group_rows=30",
        "train.batch_size=32",
        "train.epochs=4",
        "model.width=4",
        "spark.master=local[7]",  # spark-submit has the last word
    ]
    options = ["-c", str(REPOSITORY / "conf" / "quickstart.yaml")]
    options += [part for text in overrides for part in ("-o", text)]
    done = submit(zip_path, python, tmp_path, "ingest", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "runs/ingest.json"
    result = json.loads((tmp_path / "runs" / "ingest.json").read_text())
    assert sum(result["rows"].values()) == 1304
    done = submit(zip_path, python, tmp_path, "train", *options)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "runs" / "train.json").read_text())
    assert result["best_accuracy"] > 0.8
    assert not result["diverged"]
