"""Real trainings that are tracked by an MLflow server on a real PostgreSQL, which also goes down meanwhile."""

import sys
import threading
import time
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from mlflow_server import MlflowServer, free_port
from postgres_server import PostgresServer
from pyspark import cloudpickle

from pipeline.config.study import TrackingSettings
from pipeline.driver import trial
from pipeline.driver.trial import run_trial
from pipeline.telemetry.events import EventReader, EventWriter
from pipeline.tracking.outage import TrackingError
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.relay import Relay
from pipeline.tracking.tracker import Tracker

pytestmark = [pytest.mark.spark, pytest.mark.long]
cloudpickle.register_pickle_by_value(sys.modules[__name__])

DOWN_SECONDS = 6.0


@pytest.fixture(scope="module")
def database():
    server = PostgresServer()
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture(scope="module")
def server(database, tmp_path_factory):
    server = MlflowServer(tmp_path_factory.mktemp("mlflow"), store=database.uri)
    server.start()
    yield server
    server.kill()


@pytest.fixture
def study(settings, server, request):
    """The settings of trials that this server tracks."""
    tracking = TrackingSettings(uri=server.uri, experiment=request.node.name, system_metrics=False, outage_seconds=90)
    return settings.model_copy(update={"tracking": tracking})


def losses(result):
    """What the events of a training say: its steps and their losses."""
    folder = Path(result.checkpoint).parents[1]
    events = [event for event in EventReader(str(folder / "events")).new() if event["kind"] == "step"]
    return [(event["step"], event["loss"]) for event in events]


def points(database, run_id, key="train/loss"):
    query = "SELECT step, value FROM metrics WHERE run_uuid = %s AND key = %s ORDER BY step"
    return database.rows(query, run_id, key)


def strings(database, table, run_id):
    return dict(database.rows(f"SELECT key, value FROM {table} WHERE run_uuid = %s", run_id))


def all_is_there_once(database, result):
    (status,) = database.rows("SELECT status FROM runs WHERE run_uuid = %s", result.run_id)
    assert status == ("FINISHED",)
    assert [step for step, _ in losses(result)] == list(range(1, result.steps + 1))
    assert points(database, result.run_id) == losses(result)
    accuracies = [(point.step, point.accuracy) for point in result.curve]
    assert points(database, result.run_id, "test/accuracy") == accuracies


def models(database, run_id):
    """The ids of the models of a run that are whole."""
    ready = mlflow.entities.LoggedModelStatus.READY.to_int()
    query = "SELECT model_id FROM logged_models WHERE source_run_id = %s AND status = %s"
    return [row[0] for row in database.rows(query, run_id, ready)]


def test_a_parent_and_its_children_are_in_the_database(spark, database, study):
    tracker = Tracker(study.tracking)
    arms = {
        norm: study.model_copy(update={"model": study.model.model_copy(update={"norm": norm})})
        for norm in ("none", "batch")
    }
    with tracker.run("study", settings=study, kind="comparison") as parent:
        results = {
            norm: run_trial(spark, arm, tracker, name=f"study {norm}", parent=parent.run_id, kind="arm", norm=norm)
            for norm, arm in arms.items()
        }
        parent.log_text("report.html", "<p>batch</p>")
        parent.log_summary({"batch/best_accuracy_mean": results["batch"].best_accuracy})

    query = "SELECT run_uuid, runs.name, status FROM runs JOIN experiments USING (experiment_id) "
    runs = database.rows(query + "WHERE experiments.name = %s ORDER BY start_time", study.tracking.experiment)
    assert runs == [
        (parent.run_id, "study", "FINISHED"),
        (results["none"].run_id, "study none", "FINISHED"),
        (results["batch"].run_id, "study batch", "FINISHED"),
    ]
    assert strings(database, "tags", parent.run_id)["kind"] == "comparison"
    assert points(database, parent.run_id, "batch/best_accuracy_mean") == [(0, results["batch"].best_accuracy)]
    assert mlflow.artifacts.load_text(f"runs:/{parent.run_id}/report.html") == "<p>batch</p>"
    for norm, result in results.items():
        run_id = result.run_id
        all_is_there_once(database, result)
        assert points(database, run_id, "final_accuracy") == [(0, result.final_accuracy)]
        params = strings(database, "params", run_id)
        assert (params["model.norm"], params["train.epochs"], params["name"]) == (norm, "2", "small")
        assert len(params) > 50
        tags = strings(database, "tags", run_id)
        assert (tags["mlflow.parentRunId"], tags["kind"], tags["norm"]) == (parent.run_id, "arm", norm)
        assert tags["dataset_digest"].startswith("sha256:")
        inputs = "SELECT count(*) FROM inputs WHERE destination_id = %s AND source_type = 'DATASET'"
        assert database.rows(inputs, run_id) == [(1,)]
        (model_id,) = models(database, run_id)
        model = mlflow.pytorch.load_model(f"models:/{model_id}")  # through the server
        assert model(torch.from_numpy(np.zeros((2, 1, 12, 12), np.uint8))).shape == (2, 3)


def slow_steps(moment):
    """Steps take 50 ms and more, so that a database can be down for many of them."""
    if moment.name == "before_data":
        time.sleep(0.05)


@pytest.mark.parametrize("at_once", [False, True])
def test_a_database_that_is_down_during_a_training_has_each_step_once(spark, database, study, at_once):
    longer = study.model_copy(update={"train": study.train.model_copy(update={"epochs": 14})})
    down: list[float] = []

    def disturb():
        query = "SELECT count(*) FROM metrics WHERE key = 'train/loss' AND run_uuid = (SELECT run_uuid FROM runs JOIN "
        query += "experiments USING (experiment_id) WHERE experiments.name = %s)"
        give_up_at = time.monotonic() + 120
        while database.rows(query, study.tracking.experiment)[0][0] < 20 and time.monotonic() < give_up_at:
            time.sleep(0.1)
        database.stop(at_once=at_once)
        down.append(time.time())
        time.sleep(DOWN_SECONDS)
        down.append(time.time())
        database.start()

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        result = run_trial(spark, longer, Tracker(longer.tracking), name="slow", hook=slow_steps)
    finally:
        thread.join(200)
    assert result.attempts == 1
    folder = Path(result.checkpoint).parents[1]
    steps = [event for event in EventReader(str(folder / "events")).new() if event["kind"] == "step"]
    meanwhile = [event for event in steps if down[0] < event["time"] < down[1]]
    assert len(meanwhile) > 20  # the training did not wait
    assert steps[-1]["time"] > down[1]
    all_is_there_once(database, result)
    assert len(models(database, result.run_id)) == 1


def test_a_database_without_a_server_before_it_that_goes_down_has_each_step_once(database, study, tmp_path, capfd):
    tracking = study.tracking.model_copy(update={"uri": database.uri, "artifacts": str(tmp_path / "artifacts")})
    writer = EventWriter(str(tmp_path / "events"), 0, flush_seconds=0.1)
    with (
        Tracker(tracking).run("direct", settings=study) as run,
        TrainingBar("direct", 32) as bar,
        Relay(str(tmp_path / "events"), run, bar),
    ):
        for step in range(1, 401):
            if step == 100:
                database.stop()
            elif step == 300:
                database.start()
            writer.emit("step", step=step, loss=1 / step, learning_rate=0.1)
            time.sleep(0.02)
        writer.flush()
        run.log_text("note.txt", "here")
    assert points(database, run.run_id) == [(step, 1 / step) for step in range(1, 401)]
    assert [path.read_text() for path in Path(tracking.artifacts).rglob("note.txt")] == ["here"]
    assert "Traceback" not in capfd.readouterr().err  # MLflow's own, for each call


def test_a_database_that_cannot_be_reached_is_named_without_its_password(study):
    uri = f"postgresql+psycopg2://someone:secret@127.0.0.1:{free_port()}/nothing"
    began_at = time.monotonic()
    with pytest.raises(TrackingError, match=r"tracking\.uri postgresql\S+127\.0\.0\.1:\d+/nothing .*refused") as error:
        Tracker(study.tracking.model_copy(update={"uri": uri}))
    assert "secret" not in str(error.value)
    assert time.monotonic() - began_at < 20


def test_a_database_that_is_down_at_the_end_is_waited_for(spark, database, study, monkeypatch, caplog):
    """It goes down when the training has ended, and once more before the model is stored."""

    timers: list[threading.Timer] = []

    def then_down(before):
        database.stop()
        timers.append(threading.Timer(DOWN_SECONDS, database.start))
        timers[-1].start()
        return before

    train_all, log_models = trial.elastic.run, trial.log_models
    monkeypatch.setattr(trial.elastic, "run", lambda *args, **more: then_down(train_all(*args, **more)))
    monkeypatch.setattr(trial, "log_models", lambda *args: log_models(*then_down(args)))
    try:
        result = run_trial(spark, study, Tracker(study.tracking), name="ends")
    finally:
        for timer in timers:
            timer.join(60)
    assert len(timers) == 2
    all_is_there_once(database, result)
    assert points(database, result.run_id, "final_accuracy") == [(0, result.final_accuracy)]
    assert len(models(database, result.run_id)) == 1
    assert "waiting up to 90 s for it" in caplog.text
