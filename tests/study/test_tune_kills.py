"""`tune` is killed at random moments, again and again, and its results are those of a search that nobody killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import yaml
from standalone_cluster import REPOSITORY

from pipeline.driver.record import Record

pytestmark = [pytest.mark.spark, pytest.mark.long]

KILLS = int(os.environ.get("TUNE_KILLS", "20"))
OF_A_TRIAL = ("number", "state", "values", "score", "curve", "images", "learning_rate", "global_batch")


def settings_file(folder, settings):
    """Trials of two ranks, one after the other: what they suggest and prune is then the same each time."""
    folder.mkdir()
    tree = settings.model_dump(mode="json")
    tree["name"], tree["output"] = "killed", str(folder / "runs")
    tree["train"] |= {"epochs": 5, "evaluations_per_epoch": 1}
    tree["checkpoint"] |= {"every_steps": 10}
    tree["workers"] |= {"count": 2, "heartbeat_seconds": 0.2}
    tree["spark"] |= {"master": "local[2]", "conf": {"spark.sql.shuffle.partitions": "2"}}
    tree["tracking"] |= {"uri": f"sqlite:///{folder}/mlflow.db", "artifacts": str(folder / "artifacts"),
                         "system_metrics": False}  # fmt: skip
    tree["tune"] |= {
        "space": {
            "model.norm": ["none", "batch"],
            "train.learning_rate": {"low": 0.0003, "high": 0.3, "log": True},
            "model.norm_momentum": {"low": 0.01, "high": 0.5, "log": True, "when": {"model.norm": "batch"}},
        },
        "trials": 10, "random_trials": 3, "pruner_trials": 2, "confirm": 2, "confirm_seeds": [1, 2],
    }  # fmt: skip
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def start(path):
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("SPARK_", "PYSPARK_"))}
    errors = path.with_name("errors").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "pipeline", "tune", "-c", str(path)],
        env={**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        cwd=path.parent, stdout=errors, stderr=errors,
    )  # fmt: skip


def kill(process):
    """SIGKILL of the driver; what it has started ends by itself."""
    below = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait(30)
    _, left = psutil.wait_procs(below, timeout=60)
    for member in left:
        member.kill()
    assert left == []


def has_ended(path):
    """Whether the search has written down that it has a result, the last that a command does."""
    (study,) = (
        Path(path.parent, "runs", "studies").glob("*") if Path(path.parent, "runs", "studies").exists() else (None,)
    )
    return study is not None and Record(str(study)).finished


def result_of(path):
    return json.loads((path.parent / "runs" / "tune.json").read_text())


def shown(result):
    trials = [{key: trial[key] for key in OF_A_TRIAL} for trial in result["trials"]]
    confirmed = [
        {**each, "runs": [{"seed": run["seed"], "score": run["score"]} for run in each["runs"]]}
        for each in result["confirmed"]
    ]
    test = [(run["seed"], run["score"]) for run in result["test"]["runs"]]
    return trials, confirmed, test, result["winner"], result["importance"], result["verdict"]


@pytest.mark.slow
@pytest.mark.timeout(5400)
def test_twenty_random_kills_change_no_result(dataset, settings, tmp_path):
    undisturbed = settings_file(tmp_path / "undisturbed", settings)
    began_at = time.monotonic()
    assert start(undisturbed).wait(900) == 0, undisturbed.with_name("errors").read_text()[-3000:]
    seconds, expected = time.monotonic() - began_at, shown(result_of(undisturbed))
    assert {trial["state"] for trial in expected[0]} >= {"complete", "pruned"}
    draw, kills, number = random.Random(0), 0, 0
    while kills < KILLS:
        path, here = settings_file(tmp_path / f"killed-{number}", settings), 0
        while True:
            process = start(path)
            try:
                assert process.wait(draw.uniform(0, 0.7 * seconds)) == 0, path.with_name("errors").read_text()[-3000:]
                break
            except subprocess.TimeoutExpired:
                kill(process)
                here += 1
                if has_ended(path):  # it was killed on its way out: the same command would be a new search
                    break
        kills, number = kills + here, number + 1
        print(f"search {number}: {here} kills, undisturbed {seconds:.0f} s")
        assert shown(result_of(path)) == expected
        _nothing_is_there_twice(path, result_of(path))


def _nothing_is_there_twice(path, result):
    client = mlflow.MlflowClient(f"sqlite:///{path.parent}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("sparknorm").experiment_id])
    names = [run.info.run_name for run in runs]
    assert len(names) == len(set(names)) == 1 + 10 + 2 * 2 + 2
    states = {run.info.run_id: run.info.status for run in runs}
    for trial in result["trials"]:
        assert states[trial["run_id"]] == ("KILLED" if trial["state"] == "pruned" else "FINISHED")
        of_run = client.get_metric_history(trial["run_id"], "train/loss")
        steps = [metric.step for metric in of_run]
        assert steps == sorted(set(steps))
    assert set(states.values()) == {"KILLED", "FINISHED"}
    assert len(list(Path(path.parent, "runs", "trials").glob("*"))) == 10 + 2 * 2 + 2
