"""A stranger's package on a cluster: sent as a zip by ``spark.py_files``, compared with two norms, resumed, refused."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import mlflow
import pytest
import yaml

pytestmark = [pytest.mark.spark, pytest.mark.long]

REPOSITORY = Path(__file__).parents[2]
STRANGER = REPOSITORY / "tests" / "support" / "stranger" / "photonets"

# A driver of its own, which the test can kill; the package is nowhere on its path.
DRIVER = """
import os, signal, sys
from pipeline.config import load_settings
from pipeline.cluster import get_session
from pipeline.study import compare, job
settings = load_settings(sys.argv[1], sys.argv[3:])
done, train_one = [], job._train_one
def dies_after_two(*args):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(train_one(*args))
    return done[-1]
if sys.argv[2] == "dies":
    job._train_one = dies_after_two
try:
    comparison = compare(get_session(settings.spark, "strangers", trains=True), settings)
except ValueError as error:
    sys.exit(f"error: {error}")
print([arm.arm for arm in comparison.arms], flush=True)
"""


def zip_of(package, path):
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(package.rglob("*.py")):
            archive.write(file, file.relative_to(package.parent))
    return path


def run(config, how, *overrides):
    command = [sys.executable, "-c", DRIVER, str(config), how, *overrides]
    return subprocess.run(command, cwd=config.parent, capture_output=True, text=True, timeout=280, check=False)


@pytest.fixture
def config(dataset, store_uri, tmp_path):
    """A study of a stranger's network, in a folder where nothing else can be imported from."""
    package = shutil.copytree(STRANGER, tmp_path / "src" / "photonets", ignore=shutil.ignore_patterns("__pycache__"))
    tree = {
        "name": "photos",
        "output": str(tmp_path / "runs"),
        "dataset": {"path": dataset},
        "model": {"network": "photonets.nets:build", "options": {"width": 4}, "norm": ["batch", "none"]},
        "train": {"epochs": 1, "batch_size": 32, "lanes": 4, "learning_rate": 0.05},
        "compare": {"seeds": [0, 1], "side_by_side": 1},
        "workers": {"count": 2, "device": "cpu", "collective_timeout_seconds": 90},
        "tracking": {"uri": store_uri, "artifacts": str(tmp_path / "artifacts"), "system_metrics": False},
        "spark": {
            "master": "local-cluster[2,1,1024]",
            "conf": {"spark.driver.memory": "512m", "spark.sql.shuffle.partitions": "2"},
            "py_files": [str(zip_of(package, tmp_path / "photonets.zip"))],
        },
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.slow
def test_a_strangers_network_is_compared_goes_on_and_is_not_taken_for_a_changed_one(config, store_uri, tmp_path):
    died = run(config, "dies")
    assert died.returncode == -9, died.stderr[-3000:]
    done = run(config, "lives")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines()[-1] == "['batch', 'none']"
    comparison = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    assert [(run["arm"], run["seed"]) for run in comparison["runs"]] == [
        ("batch", 0), ("none", 0), ("batch", 1), ("none", 1),
    ]  # fmt: skip
    assert not any(run["diverged"] for run in comparison["runs"])
    client = mlflow.MlflowClient(store_uri)
    children = client.search_runs(["1"], "tags.kind = 'arm'")
    assert len(children) == 4  # the two that were done before the driver died were not repeated
    assert {run.data.params["model.options.width"] for run in children} == {"4"}
    # Another source is another study.
    nets = tmp_path / "src" / "photonets" / "nets.py"
    nets.write_text(nets.read_text().replace("nn.ReLU()", "nn.SiLU()"))
    zip_of(nets.parent, tmp_path / "photonets.zip")
    before = set((tmp_path / "runs" / "trials").iterdir())
    again = run(config, "lives", "compare.seeds=[0]", "model.norm=none")
    assert again.returncode == 0, again.stderr[-3000:]
    assert len(set((tmp_path / "runs" / "trials").iterdir()) - before) == 1


def test_what_executors_cannot_import_is_said_before_a_run_is_opened(config, store_uri, tmp_path):
    (tmp_path / "photonets").symlink_to(tmp_path / "src" / "photonets")  # in the driver's folder alone
    done = run(config, "lives", "spark.py_files=[]")
    assert done.returncode == 1
    words = "error: model.network photonets.nets:build: on "
    line = next(line for line in done.stderr.splitlines() if line.startswith(words))
    assert "there is no module photonets to import here: give its .py file or zip in spark.py_files" in line
    done = run(config, "lives", "model.options.widht=4")
    assert (
        "its signature has no widht (model.options); it has blocks, head_norm, width; did you mean width?"
        in done.stderr
    )
    assert mlflow.MlflowClient(store_uri).search_runs(["0", "1"]) == []
    assert not (tmp_path / "runs" / "trials").exists()
