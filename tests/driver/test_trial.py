"""A whole run through Spark and MLflow while a worker is killed."""

import os
import signal
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from pyspark import cloudpickle

from pipeline.cluster.errors import WorkerError
from pipeline.config.training import AugmentSettings, CheckpointSettings
from pipeline.data import load_manifest
from pipeline.driver import record, trial
from pipeline.driver.trial import run_trial
from pipeline.report.comparison import TrialResult
from pipeline.telemetry.events import EventReader
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
        trial.storage, "publish", lambda path, data: None if path.endswith(job.TOKEN) else publish(path, data)
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
    monkeypatch.setattr(record.os, "getpid", os.getppid)  # as if the process that started this one had begun it
    trial._begin(settings, load_manifest(settings.dataset.path), "busy", None).record.claim("busy")
    monkeypatch.undo()
    with pytest.raises(record.BusyError, match=rf"is being trained by process {os.getppid()} on"):
        run_trial(spark, settings, Tracker(settings.tracking), name="busy")
