"""A whole run through Spark and MLflow while a worker is killed."""

import os
import signal
import sys
from pathlib import Path

import mlflow
import pytest
import torch
from pyspark import cloudpickle

from pipeline import checkpoint, train, trial
from pipeline.barrier import WorkerError
from pipeline.progress import TrainingBar
from pipeline.tracking import TrackedRun, Tracker
from pipeline.trial import run_trial

pytestmark = pytest.mark.spark
cloudpickle.register_pickle_by_value(sys.modules[__name__])


def fit_and_die(worker, job):
    """Rank 1 of the first attempt dies by SIGKILL in the middle of the second epoch."""
    mark = Path(job.folder) / f"attempt-of-rank-{worker.rank}"
    if worker.rank == 1 and not mark.exists():
        step = train._Trainer._step

        def dying_step(self, batches):
            if self.progress.step == self.steps_per_epoch + 5:
                os.kill(os.getpid(), signal.SIGKILL)
            step(self, batches)

        train._Trainer._step = dying_step
    mark.write_text(mark.read_text() + "x" if mark.exists() else "x")
    return train.fit(worker, job)


def weights(settings, result):
    folder = Path(result["checkpoint"]).parent
    job = train.Job(settings.dataset.path, str(folder.parent), settings.model, settings.train)
    return checkpoint.load_newest(str(folder), identity=train.facts(job), device=torch.device("cpu"))["model"]


def test_a_killed_worker_changes_nothing_but_the_time(spark, settings, monkeypatch):
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 3})})
    tracker = Tracker(settings.tracking)
    expected = run_trial(spark, settings, tracker, name="undisturbed")
    monkeypatch.setattr(train, "fit", fit_and_die)
    result = run_trial(spark, settings, tracker, name="killed")
    folder = Path(settings.output) / "trials" / result["run_id"]
    assert (folder / "attempt-of-rank-0").read_text() == "xx"
    assert result["curve"] == expected["curve"]
    before, after = weights(settings, expected), weights(settings, result)
    assert all(torch.equal(before[name], after[name]) for name in before)
    # One run, each step once.
    client = mlflow.MlflowClient(settings.tracking.uri)
    for metric, steps in (
        ("train/loss", list(range(1, result["steps"] + 1))),
        ("test/accuracy", [point["step"] for point in result["curve"]]),
    ):
        assert [m.step for m in client.get_metric_history(result["run_id"], metric)] == steps


def test_an_output_that_workers_do_not_see_is_refused_before_step_one(spark, settings, monkeypatch):
    publish = trial.storage.publish
    monkeypatch.setattr(
        trial.storage, "publish", lambda path, data: None if path.endswith(train.TOKEN) else publish(path, data)
    )
    with pytest.raises(WorkerError, match="written by the driver, is not seen here: set `output` to a place"):
        run_trial(spark, settings, Tracker(settings.tracking), name="unshared")
    (run,) = mlflow.search_runs(search_all_experiments=True, output_format="list")
    assert run.info.status == "FAILED"
    assert "set `output` to a place" in run.data.tags["failure"]


STEPS = [{"kind": "step", "time": float(n), "step": n, "loss": 1.0, "learning_rate": 0.1} for n in range(1, 4)]


def test_metrics_that_mlflow_does_not_take_are_offered_again(settings, monkeypatch):
    tracker = Tracker(settings.tracking)
    with tracker.run("flaky", settings=settings) as run:
        take = run._client.log_batch
        answers = iter([OSError("database is locked"), None])

        def sometimes(*args, **kwargs):
            if (answer := next(answers)) is not None:
                raise answer
            return take(*args, **kwargs)

        monkeypatch.setattr(run._client, "log_batch", sometimes)
        with pytest.raises(OSError, match="locked"):
            run.log_events(STEPS)
        run.log_events(STEPS)
        assert len(run._client.get_metric_history(run.run_id, "train/loss")) == 3


def test_steps_that_a_restarted_gang_repeats_are_logged_once(settings):
    with Tracker(settings.tracking).run("repeated", settings=settings) as run:
        assert isinstance(run, TrackedRun)
        run.log_events(STEPS)
        run.log_events(STEPS[1:])
        assert [m.step for m in run._client.get_metric_history(run.run_id, "train/loss")] == [1, 2, 3]


def test_the_bar_takes_old_steps_and_a_restart_at_once():
    with TrainingBar("x", batch_size=32) as bar:
        bar.show([*STEPS, {"kind": "start", "total_steps": 10, "epochs": 2}])
        bar.show(STEPS)
