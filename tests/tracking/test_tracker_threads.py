"""Trials side by side, each in a thread of its own, in one store; and what tracking writes to the console."""

import os
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import mlflow
import numpy as np
import pytest
import sqlalchemy
import torch

from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.telemetry.events import EventWriter
from pipeline.tracking import client
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.relay import Relay
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[2]
TRIALS, STEPS = 4, 400


@pytest.fixture
def settings(store_uri, tmp_path):
    where = TrackingSettings(uri=store_uri, artifacts=str(tmp_path / "artifacts"), outage_seconds=60)
    return Settings(name="threads", tracking=where)


@pytest.fixture
def tracker(settings):
    return Tracker(settings.tracking)


class Images(torch.nn.Module):
    """uint8 images to logits."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.linear(x.flatten(1).float())


def train(folder, run, title, *, pause_seconds=0.0):
    """What a trial does with its run while it trains."""
    with TrainingBar(title, 32) as bar, Relay(str(folder), run, bar):
        writer = EventWriter(str(folder), 0, flush_seconds=0.1)
        for step in range(1, STEPS + 1):
            writer.emit("step", step=step, loss=1 / step, learning_rate=0.1)
            time.sleep(pause_seconds)
        writer.flush()


def steps_in(run_id):
    return [point.step for point in mlflow.MlflowClient().get_metric_history(run_id, "train/loss")]


def test_trials_in_threads_are_runs_of_their_own_below_the_parent(tracker, settings, tmp_path):
    together = threading.Barrier(TRIALS, timeout=60)

    def trial(number, parent):
        run_id = ""
        try:
            with tracker.run(f"trial {number}", settings=settings, parent=parent, number=number) as run:
                run_id = run.run_id
                together.wait()  # all are open at once
                assert mlflow.active_run().info.run_id == run_id
                train(tmp_path / str(number), run, f"trial {number}", pause_seconds=0.002)
                run.log_summary({"number": number})
                run.log_model(Images().eval(), (1, 3, 4))
                together.wait()
                if number == 1:
                    raise ZeroDivisionError
        except ZeroDivisionError:
            pass
        assert mlflow.active_run() is None
        return run_id

    with tracker.run("parent", settings=settings, kind="comparison") as parent:
        with ThreadPoolExecutor(TRIALS) as threads:
            ids = list(threads.map(trial, range(TRIALS), [parent.run_id] * TRIALS))
        assert mlflow.active_run().info.run_id == parent.run_id
        assert mlflow.get_run(parent.run_id).info.status == "RUNNING"

    assert mlflow.get_run(parent.run_id).info.status == "FINISHED"
    assert len({parent.run_id, *ids}) == TRIALS + 1
    for number, run_id in enumerate(ids):
        run = mlflow.get_run(run_id)
        assert run.info.status == ("FAILED" if number == 1 else "FINISHED")
        assert run.data.tags["mlflow.parentRunId"] == parent.run_id
        assert run.data.tags["mlflow.runName"] == f"trial {number}"
        assert run.data.metrics["number"] == number
        assert run.data.params["name"] == "threads"
        assert steps_in(run_id) == list(range(1, STEPS + 1))
        (output,) = run.outputs.model_outputs
        model = mlflow.pytorch.load_model(f"models:/{output.model_id}")
        assert model(torch.from_numpy(np.zeros((2, 1, 3, 4), np.uint8))).shape == (2, 3)
    # MLflow watches which variables a model reads, by replacing these.
    assert (os._Environ.get.__module__, os._Environ.__getitem__.__module__) == ("collections.abc", "os")


def test_a_store_that_another_writer_locks_has_each_step_once(tracker, settings, tmp_path, caplog):
    def impatient(_connection, _cursor, statement, parameters, _context, _many):
        """MLflow waits 20 s for a lock; 50 ms shows the error sooner."""
        return statement.replace("busy_timeout = 20000", "busy_timeout = 50"), parameters

    def lock():
        for _ in range(3):
            with closing(sqlite3.connect(tmp_path / "mlflow.db", timeout=30)) as database:
                database.execute("BEGIN EXCLUSIVE")
                time.sleep(1.5)
            time.sleep(0.5)

    def trial(number):
        with tracker.run(f"trial {number}", settings=settings) as run:
            train(tmp_path / str(number), run, f"trial {number}", pause_seconds=0.01)
            run.log_summary({"number": number})
        return run.run_id

    before_cursor_execute = (sqlalchemy.Engine, "before_cursor_execute", impatient)
    sqlalchemy.event.listen(*before_cursor_execute, retval=True)
    locker = threading.Thread(target=lock)
    locker.start()
    try:
        with ThreadPoolExecutor(3) as threads:
            ids = list(threads.map(trial, range(3)))
    finally:
        locker.join()
        sqlalchemy.event.remove(*before_cursor_execute)
    assert "database is locked" in caplog.text  # it was an outage, told once for each wait
    assert "Traceback" not in caplog.text
    for number, run_id in enumerate(ids):
        assert steps_in(run_id) == list(range(1, STEPS + 1))
        assert mlflow.get_run(run_id).info.status == "FINISHED"
        assert mlflow.get_run(run_id).data.metrics["number"] == number


def test_the_time_for_an_upload_ends_with_the_last_of_them(monkeypatch):
    monkeypatch.setenv(client.TIMEOUT, client.CALL_SECONDS)

    def seconds():
        return os.environ[client.TIMEOUT]

    entered, leave, left = ([threading.Event() for _ in range(2)] for _ in range(3))

    def upload(number):
        with client.time_to_upload():
            entered[number].set()
            leave[number].wait(30)
        left[number].set()

    with ThreadPoolExecutor(2) as threads:
        for number in range(2):
            threads.submit(upload, number)
            entered[number].wait(30)
        assert seconds() == client.UPLOAD_SECONDS
        leave[0].set()  # the one that began first ends first
        left[0].wait(30)
        assert seconds() == client.UPLOAD_SECONDS
        leave[1].set()
        left[1].wait(30)
        assert seconds() == client.CALL_SECONDS

    with pytest.raises(ZeroDivisionError), client.time_to_upload(), client.time_to_upload():
        raise ZeroDivisionError
    assert seconds() == client.CALL_SECONDS
    for own in ("77", client.UPLOAD_SECONDS):  # what the user has set stays
        monkeypatch.setenv(client.TIMEOUT, own)
        with client.time_to_upload():
            assert seconds() == own
        assert seconds() == own


@pytest.mark.spark
def test_a_training_with_a_new_store_writes_no_warning(dataset, tmp_path):
    """With every warning that Python knows switched on."""
    small = ["model.network=cnn", "model.depth=3", "model.width=4", "train.epochs=1", "train.lanes=4",
             "train.batch_size=32", "workers.count=2", f"dataset.path={dataset}"]  # fmt: skip
    words = [word for override in small for word in ("-o", override)]
    done = subprocess.run(
        [sys.executable, "-W", "default", "-m", "pipeline", "train", "-c", REPOSITORY / "conf/quickstart.yaml", *words],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "runs/train.json\n"
    said = [line for line in done.stderr.splitlines() if "warning" in line.lower()]
    assert said == []
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs" / "mlflow.db").exists()
