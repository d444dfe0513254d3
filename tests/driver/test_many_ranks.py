"""64 workers on one machine: a training of a tiny network with evaluations, of which one worker is killed."""

import json
import os

import pytest
from small_data import dataset_settings, write_idx_folder
from standalone_cluster import run_driver

pytestmark = [pytest.mark.spark, pytest.mark.slow, pytest.mark.timeout(1500)]

RANKS = int(os.environ.get("SPARKNORM_RANKS", "64"))

DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from pipeline.cluster.session import get_session
from pipeline.config.cluster import SparkSettings, WorkerSettings
from pipeline.config.model import ModelSettings
from pipeline.training.job import Job
from small_training import equal, events, final_state, launch, make_job, seconds_lost, steps_not_told

master, dataset, folder, count = sys.argv[1:]
count = int(count)
spark = get_session(SparkSettings(master=master), "many ranks", trains=True)
workers = WorkerSettings(count=count, device="cpu", stall_seconds=400)
train = {"epochs": 3, "batch_size": 2 * count, "lanes": count, "every_steps": 3}

def kill(run):
    run.saved(3)
    return run.kill(run.at_step(4, rank=count - 1).pid)

told = {}
for name, meanwhile in (("undisturbed", None), ("killed", kill)):
    job = make_job(dataset, f"{folder}/{name}", **train)
    outcome = launch(spark, job, workers, meanwhile=meanwhile)
    told[name] = {**outcome.values(), "job": job.folder}
    if outcome.result is not None:
        told[name]["steps_not_told"] = steps_not_told(job, outcome.result.steps)
        told[name]["evaluations"] = len(events(job, "evaluation"))
        told[name]["starts"] = len(events(job, "start"))
if all(each["error"] == "" for each in told.values()):
    states = [final_state(make_job(dataset, f"{folder}/{name}", **train)) for name in told]
    told["equal"] = equal(*states)
    told["lost"] = seconds_lost(job, outcome.did["killed_at"])
Path(folder, "told.json").write_text(json.dumps(told))
spark.stop()
"""


def test_64_workers_train_evaluate_and_go_on_after_a_kill(spark, tmp_path):
    from pipeline.ingest.job import ingest_dataset

    source = write_idx_folder(tmp_path / "idx", train_rows=40 * RANKS, test_rows=200)
    settings = dataset_settings(tmp_path / "dataset", source, row_group_rows=12)
    ingest_dataset(spark, settings, cache=str(tmp_path))
    run_driver(DRIVER, f"local[{RANKS}]", settings.path, str(tmp_path), str(RANKS), timeout=1400)
    told = json.loads((tmp_path / "told.json").read_text())
    for name in ("undisturbed", "killed"):
        assert told[name]["error"] == ""
        assert told[name]["result"]["world_size"] == RANKS
        assert told[name]["steps_not_told"] == []
        assert told[name]["evaluations"] >= 3
    assert [told[name]["starts"] for name in ("undisturbed", "killed")] == [1, 2]
    assert told["equal"]
    print(f"{RANKS} ranks: {told['undisturbed']['seconds']:.1f} s, {told['lost']:.1f} s lost by a kill")
