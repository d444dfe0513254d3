"""A whole run through Spark and MLflow while a worker is killed."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import mlflow
import psutil
import pytest
import torch
from pyspark import cloudpickle
from small_training import trial_folder

from pipeline import storage
from pipeline.cluster.errors import WorkerError
from pipeline.config.augment import AugmentSettings
from pipeline.config.training import CheckpointSettings
from pipeline.data import load_manifest
from pipeline.driver import lease, record, trial
from pipeline.driver.lease import record_path
from pipeline.driver.trial import run_trial
from pipeline.report.comparison import TrialResult
from pipeline.telemetry import heartbeat
from pipeline.telemetry.events import EventReader
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.tracker import Tracker
from pipeline.training import checkpoint, job
from pipeline.training.predictions import FILE
from pipeline.training.versions import VersionsError, current_versions

pytestmark = [pytest.mark.spark, pytest.mark.long]
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def die_in_the_second_epoch(moment):
    """Rank 1 of the first attempt dies by SIGKILL in the middle of the second epoch."""
    mark = Path(moment.job.folder) / f"attempt-of-rank-{moment.worker.rank}"
    if moment.name == "network_built":
        mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
    elif moment.name == "checkpoint_begun":
        moment.wait_until_written()  # the newest checkpoint is whole when the worker dies, however busy the machine is
    dies_at = ("before_data", 1, moment.steps_per_epoch + 5)
    if (moment.name, moment.worker.rank, moment.step) == dies_at and mark.read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)


def weights(settings, result):
    folder = Path(result.checkpoint).parent
    key = job.Job(settings.dataset.path, str(folder.parent), settings.model, settings.train)
    return checkpoint.load_newest(str(folder), identity=job.identity(key), device=torch.device("cpu"))["model"]


def test_a_killed_worker_changes_nothing_but_the_time(spark, settings):
    train_settings = settings.train.model_copy(update={"epochs": 3, "augment": AugmentSettings(flip=True, shift=1)})
    when = CheckpointSettings(every_steps=2)
    settings = settings.model_copy(update={"train": train_settings, "checkpoint": when})
    tracker = Tracker(settings.tracking)
    expected = run_trial(spark, settings, tracker, name="undisturbed")
    result = run_trial(spark, settings, tracker, name="killed", hook=die_in_the_second_epoch)
    folder = Path(result.checkpoint).parents[1]
    assert (folder / "attempt-of-rank-0").read_text() == "xx"
    assert (expected.attempts, result.attempts) == (1, 2)
    assert result.curve == expected.curve
    before, after = weights(settings, expected), weights(settings, result)
    assert all(torch.equal(before[name], after[name]) for name in before)
    client = mlflow.MlflowClient(settings.tracking.uri)
    published = [Path(trained.predictions).read_bytes() for trained in (expected, result)]
    assert published[0] == published[1] == Path(client.download_artifacts(result.run_id, FILE)).read_bytes()
    # It went on from the middle of an epoch.
    starts = [event for event in EventReader(str(folder / "events")).new() if event["kind"] == "start"]
    assert [start["attempt"] for start in starts] == [1, 2]
    steps_per_epoch = result.steps // 3
    assert steps_per_epoch < starts[1]["restored_from"] <= steps_per_epoch + 5
    # One run, each step once.
    for metric, steps in (
        ("train/loss", list(range(1, result.steps + 1))),
        ("test/accuracy", [point.step for point in result.curve]),
    ):
        assert [m.step for m in client.get_metric_history(result.run_id, metric)] == steps


def test_an_output_that_workers_do_not_see_is_refused_before_step_one(spark, settings, monkeypatch):
    publish = trial.storage.publish
    monkeypatch.setattr(
        trial.storage,
        "publish",
        lambda path, data, **how: None if path.endswith(job.TOKEN) else publish(path, data, **how),
    )
    with pytest.raises(WorkerError, match="written by the driver, is not seen here: set `output` to a place"):
        run_trial(spark, settings, Tracker(settings.tracking), name="unshared")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FAILED"
    assert "set `output` to a place" in run.data.tags["failure"]


def forget(result):
    """A result without what differs from run to run: its id, its folder and its times."""
    return result.model_dump(include={"best_accuracy", "final_accuracy", "steps", "curve", "train_loss"})


def test_the_same_command_goes_on_with_what_it_did_not_finish(spark, settings):
    """The driver fails in the middle; the next call continues in the same run and folder, and a third starts anew."""
    tracker = Tracker(settings.tracking)
    with pytest.raises(WorkerError, match=r"in data loading, epoch 1, step \d+: RuntimeError: the disk of a worker"):
        run_trial(spark, settings, tracker, name="begun", hook=fail_in_the_second_epoch)
    (begun,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    result = run_trial(spark, settings, tracker, name="begun")
    assert result.run_id == begun.info.run_id
    assert result.attempts >= 2  # 3 where a state was saved before: then the first call has tried again itself
    again = run_trial(spark, settings, tracker, name="begun")
    assert again.run_id != result.run_id
    assert forget(again) == forget(result)
    before, after = weights(settings, again), weights(settings, result)
    assert all(torch.equal(before[name], after[name]) for name in before)


def fail_in_the_second_epoch(moment):
    if moment.name == "before_data" and moment.step == moment.steps_per_epoch + 1:
        raise RuntimeError("the disk of a worker is gone")


def be_slow(moment):
    if moment.name == "before_data":
        time.sleep(0.3)


def fail(*_):
    raise OSError("the store was gone for a moment")


def test_a_trial_that_ended_before_its_run_was_written_down_goes_on_in_that_run(spark, settings, monkeypatch):
    tracker = Tracker(settings.tracking)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="gone for a moment"):
        patch.setattr(TrackedRun, "log_params", fail)
        run_trial(spark, settings, tracker, name="begun")
    (begun,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run_trial(spark, settings, tracker, name="begun").run_id == begun.info.run_id
    assert len(mlflow.search_runs(search_all_experiments=True, output_format="list")) == 1


def test_a_training_that_was_taken_over_stops_and_its_run_goes_on_elsewhere(spark, settings, monkeypatch):
    """As if this driver had been away for long: another one has taken the training over, and has begun to train."""
    monkeypatch.setattr(record, "LEASE_SECONDS", 1.5)
    settings = settings.model_copy(update={"checkpoint": CheckpointSettings(every_steps=2)})
    tracker, stopped = Tracker(settings.tracking), {}

    def take_over():
        under_way = (beat for _ in iter(int, 1) for beat in [first_beat(settings.output)] if beat and beat.step >= 5)
        stopped["pid"], folder = next(under_way).pid, str(trial_folder(settings.output))
        first = json.loads(Path(record_path(folder, 1)).read_text())
        elsewhere = {**first["driver"], "host": "elsewhere", "machine": "another", "since": "today"}
        storage.create(record_path(folder, 2), json.dumps({**first, "driver": elsewhere}).encode())
        storage.publish(f"{folder}/{job.TOKEN}", b"of the other driver")
        heartbeat.end_attempt(folder)

    other = threading.Thread(target=take_over, daemon=True)
    other.start()
    with pytest.raises(lease.TakenOverError, match=r"was taken over by process [0-9]+ on elsewhere at today"):
        run_trial(spark, settings, tracker, name="taken", hook=be_slow)
    other.join(10)
    psutil.wait_procs([psutil.Process(stopped["pid"])] if psutil.pid_exists(stopped["pid"]) else [], timeout=20)
    assert not psutil.pid_exists(stopped["pid"])
    (left,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert (left.info.status, "failure" in left.data.tags) == ("RUNNING", False)
    # The other driver dies, and here the training goes on with what both have left.
    result = run_trial(spark, settings, tracker, name="taken")
    assert result.run_id == left.info.run_id
    steps = [m.step for m in mlflow.MlflowClient().get_metric_history(result.run_id, "train/loss")]
    assert steps == list(range(1, result.steps + 1))
    assert record.Record(str(trial_folder(settings.output))).result() == result


def first_beat(output):
    """The heartbeat of rank 0 of the newest trial, where there is one."""
    with contextlib.suppress(FileNotFoundError, ValueError, AttributeError, TypeError):
        return heartbeat.read_beat(str(trial_folder(output)), 0)


RESULT = {
    **dict.fromkeys(("best_accuracy", "final_accuracy", "final_balanced_accuracy", "final_macro_f1"), 0.5),
    **dict.fromkeys(("final_loss", "final_calibration_error", "images_per_second", "data_wait_share")),
    **dict.fromkeys(("curve", "recall", "train_loss", "train_seconds", "ranks"), ()),
    "steps": 3, "diverged": False, "world_size": 2, "attempts": 1, "checkpoint": "", "run_id": "5fd1",
}  # fmt: skip


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        ({"versions": {"sparknorm": "0.7.9", "torch": "2.4.1"}}, "sparknorm 0.7.9 and torch 2.4.1, and here is "),
        ({}, "sparknorm 0.7.0 or earlier, which did not note versions, and here is "),
    ],
)
def test_a_finished_trial_of_other_versions_is_warned_of_or_refused(spark, settings, caplog, versions, words):
    """0.7.0 took it without a word."""
    name, tracker = "done", Tracker(settings.tracking)
    finished = trial._begin(settings, load_manifest(settings.dataset.path), name, "a study").record
    finished.update(result=TrialResult(**RESULT, **versions))
    assert run_trial(spark, settings, tracker, name=name, parent="a study").run_id == "5fd1"
    assert f"the finished training 'done' in {finished.folder} was made with {words}" in caplog.text
    when = settings.checkpoint.model_copy(update={"other_versions": "refuse"})
    with pytest.raises(VersionsError, match=r"was made with sparknorm 0\.7\..* set checkpoint\.other_versions=warn"):
        run_trial(spark, settings.model_copy(update={"checkpoint": when}), tracker, name=name, parent="a study")


def test_a_finished_trial_of_these_versions_is_taken_without_a_word(spark, settings, caplog):
    finished = trial._begin(settings, load_manifest(settings.dataset.path), "done", "a study").record
    finished.update(result=TrialResult(**RESULT, versions=current_versions()))
    assert run_trial(spark, settings, Tracker(settings.tracking), name="done", parent="a study").run_id == "5fd1"
    assert "was made with" not in caplog.text


def test_a_trial_that_another_process_trains_is_refused(spark, settings, monkeypatch):
    monkeypatch.setattr(lease.os, "getpid", os.getppid)  # as if the process that started this one had begun it
    trial._begin(settings, load_manifest(settings.dataset.path), "busy", None).record.claim("busy")
    monkeypatch.undo()
    with pytest.raises(lease.BusyError, match=rf"is being trained by process {os.getppid()} on"):
        run_trial(spark, settings, Tracker(settings.tracking), name="busy")
