"""A real disk that is full while a network is trained: the file system itself says so, to all processes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import pytest
from command_process import in_a_process, is_under_way, wait_for
from mounts import on_a_disk, small_disk
from small_training import equal, final_state, launch, make_job, make_settings, trial_folder
from standalone_cluster import REPOSITORY

from pipeline.telemetry.events import EventReader
from pipeline.training import checkpoint

pytestmark = [pytest.mark.spark, pytest.mark.long]

EPOCHS = 24


def test_a_training_says_so_in_one_line_and_goes_on_when_there_is_room(spark, dataset, store_uri, tmp_path):
    job = make_job(dataset, tmp_path / "undisturbed", epochs=EPOCHS)
    expected = launch(spark, job)
    assert expected.result is not None, expected.error
    folder = tmp_path / "disk"
    folder.mkdir()
    tracking = {"uri": store_uri, "artifacts": str(tmp_path / "artifacts"), "experiment": "full"}
    settings = make_settings(job, folder / "runs", store_uri, "full", master="local[2]", tracking=tracking)
    with small_disk(folder, "size=230m") as disk:
        output = disk.seen_here / "runs"
        with in_a_process("train", settings, tmp_path / "first", within=disk.enter) as process:
            trial = wait_for("trial", lambda: trial_folder(output), process, tmp_path / "first")
            wait_for("step 60", lambda: is_under_way(trial), process, tmp_path / "first")
            until = time.monotonic() + 240
            while process.poll() is None and time.monotonic() < until:
                disk.fill()  # also what a checkpoint that is not written leaves again
                time.sleep(0.02)
            assert process.wait(0) == 1
        told = Path(tmp_path, "first", "errors").read_text()
        (error,) = [line for line in told.splitlines() if line.startswith("error: ")]
        host = socket.gethostname()
        assert error.startswith(f"error: rank 0 on {host} (cpu) in "), told
        inside = f"'{folder}/runs/trials/{trial.name}/"
        assert "OutputError: " in error
        assert f"[Errno 28] No space left on device on {host}: {inside}" in error
        assert "make room there or set `output` to another disk, and give the same command again: it goes on" in error
        assert "Traceback" not in told
        # Still full: said before Spark starts.
        with in_a_process("train", settings, tmp_path / "second", within=disk.enter) as process:
            assert process.wait(60) == 1
        told = Path(tmp_path, "second", "errors").read_text()
        assert told.startswith(f"error: output {folder}/runs cannot be written from {host}: No space left on device")
        # Nothing is half done: the newest checkpoint is whole.
        saved = checkpoint.newest_step(f"{trial}/checkpoints")
        assert saved >= 3
        assert final_state(make_job(dataset, trial, epochs=EPOCHS))["step"] == saved
        disk.make_room()
        with in_a_process("train", settings, tmp_path / "third", within=disk.enter) as process:
            assert process.wait(240) == 0, Path(tmp_path, "third", "errors").read_text()[-3000:]
        starts = [each["restored_from"] for each in EventReader(f"{trial}/events").new() if each["kind"] == "start"]
        assert starts == [0, saved]
        assert equal(final_state(job), final_state(make_job(dataset, trial, epochs=EPOCHS)))
    (run,) = mlflow.MlflowClient(store_uri).search_runs([_experiment(store_uri)])
    assert run.info.status == "FINISHED"
    steps = [metric.step for metric in mlflow.MlflowClient(store_uri).get_metric_history(run.info.run_id, "train/loss")]
    assert steps == list(range(1, expected.result.steps + 1))


def test_an_ingest_names_the_setting_and_the_file(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    words = [sys.executable, "-m", "pipeline", "ingest", "-c", str(REPOSITORY / "conf" / "quickstart.yaml"),
             "-o", f"dataset.path={folder}/data", "-o", f"output={tmp_path}/runs"]  # fmt: skip
    done = subprocess.run(
        [*on_a_disk(folder, "size=8m"), *words],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: the Spark job failed: ")
    assert f"No space left on device on {socket.gethostname()}: '{folder}/data/" in error
    assert error.endswith(": make room there, or choose another dataset.path")


SILENT = """
import sys
import time
from pipeline.cluster.guard import Guard
from pipeline.cluster.errors import LaunchError
from pipeline.cluster.watch import Watch
from pipeline.config.cluster import WorkerSettings

workers = WorkerSettings(count=1, stall_seconds=0.2, slots_wait_seconds=0.1)
guard = Guard(workers, Watch(sys.argv[1], workers))
time.sleep(0.5)
try:
    guard.check_ranks(None)
except LaunchError as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_ranks_that_cannot_write_signs_of_life_are_not_said_to_be_gone(tmp_path):
    words = on_a_disk(tmp_path, "size=64k", fill=True)
    done = subprocess.run(
        [*words, sys.executable, "-c", SILENT, str(tmp_path)], capture_output=True, text=True, timeout=60, check=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.stdout.startswith(f"LaunchError: {tmp_path} has no room left, where workers say how they are")
    assert "make room there or set `output` to another disk" in done.stdout


def _experiment(uri):
    return mlflow.MlflowClient(uri).get_experiment_by_name("full").experiment_id
