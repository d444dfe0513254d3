"""Runs in a store on this machine: what is logged, each thing once, and how a run ends."""

import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException, RestException

from pipeline.cluster.errors import KilledError
from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.driver.record import Record
from pipeline.driver.trial import recall_metrics
from pipeline.tracking import outage
from pipeline.tracking.outage import NotOwnerError, TrackingError, is_outage, reason, retry_during_outage
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.tracker import Tracker

STEPS = [{"kind": "step", "time": float(n), "step": n, "loss": 1.0, "learning_rate": 0.1} for n in range(1, 4)]
RANKS = [
    {"rank": 0, "data_wait_seconds": 0.5, "compute_seconds": 2.0, "all_reduce_seconds": None, "steps": 10},
    {"rank": 1, "data_wait_seconds": 0.25, "compute_seconds": 3.0, "all_reduce_seconds": 0.1, "steps": 10},
    {"rank": 2, "data_wait_seconds": 0.0, "compute_seconds": 0.0, "all_reduce_seconds": 0.0, "steps": 0},
]


def evaluation(step, **fields):
    return {"kind": "evaluation", "time": 1.0, "step": step, "split": "test", "accuracy": 0.5, "loss": 1.0,
            "train_loss": None, "images_per_second": 7.0, "epoch": 1, **fields}  # fmt: skip


@pytest.fixture(scope="module")
def store(empty_store, tmp_path_factory):
    """A folder with one store for all tests."""
    folder = tmp_path_factory.mktemp("mlflow")
    shutil.copy(empty_store, folder)
    return folder


@pytest.fixture
def settings(store, request):
    tracking = TrackingSettings(
        uri=f"sqlite:///{store}/mlflow.db",
        artifacts=str(store / "artifacts"),
        experiment=request.node.name,
        system_metrics=False,
        outage_seconds=30,
    )
    return Settings(name="small", tracking=tracking)


@pytest.fixture
def tracker(settings):
    return Tracker(settings.tracking)


def steps_in(run_id, metric="train/loss"):
    return [point.step for point in mlflow.MlflowClient().get_metric_history(run_id, metric)]


def test_metrics_that_mlflow_does_not_take_are_offered_again(tracker, settings, monkeypatch):
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
        assert steps_in(run.run_id) == [1, 2, 3]


def test_steps_that_a_restarted_gang_repeats_are_logged_once(tracker, settings):
    with tracker.run("repeated", settings=settings) as run:
        assert isinstance(run, TrackedRun)
        run.log_events([*STEPS[:2], evaluation(2)])
        run.log_events([STEPS[1], evaluation(2), STEPS[2], evaluation(3)])
        assert steps_in(run.run_id) == [1, 2, 3]
        assert steps_in(run.run_id, "test/accuracy") == [2, 3]


def test_a_run_goes_on_from_what_mlflow_has(tracker, settings):
    many = [{**STEPS[0], "step": step, "time": float(step)} for step in range(1, 2001)]
    with pytest.raises(ZeroDivisionError), tracker.run("first", settings=settings, seed=1) as first:
        first.log_events(many[:1500])
        first.log_events([evaluation(1500)])
        first.log_summary({"steps": 1500, "note": "x"})
        raise ZeroDivisionError
    longer = settings.model_copy(update={"name": "other", "output": "elsewhere"})
    with tracker.run("second", settings=longer, run_id=first.run_id, seed=1) as second:
        assert mlflow.get_run(first.run_id).info.status == "RUNNING"
        second.log_events([*many, evaluation(1500), evaluation(2000)])
        second.log_summary({"steps": 1500, "note": "x"})
    assert second.run_id == first.run_id
    assert steps_in(first.run_id) == steps_in(first.run_id, "train/learning_rate") == list(range(1, 2001))
    assert steps_in(first.run_id, "test/accuracy") == [1500, 2000]
    assert len(steps_in(first.run_id, "steps")) == 1
    run = mlflow.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert "failure" not in run.data.tags
    assert run.data.params["name"] == "small"  # MLflow changes no param: the first one stays


def test_a_run_that_another_process_goes_on_with_is_left_as_it_is(tracker, settings, tmp_path):
    lease = Record(str(tmp_path)).claim("a")
    with (
        pytest.raises(NotOwnerError, match="another process goes on with MLflow run"),
        tracker.run("left", settings=settings, owner=lease) as run,
    ):
        run.log_events(STEPS[:1])
        (tmp_path / "record-0002.json").write_text("{}")  # as another process does that takes over
        assert not lease.holds()
        for call in (lambda: run.log_summary({"note": "x"}), lambda: run.log_text("note", "x")):
            with pytest.raises(NotOwnerError):
                call()
        run.log_events(STEPS)  # the other one passes them on
    assert mlflow.active_run() is None  # which MLflow would end at the exit of this process
    left = mlflow.get_run(run.run_id)
    assert left.info.status == "RUNNING"
    assert {"note", "failure"}.isdisjoint(left.data.tags)
    assert steps_in(run.run_id) == [1]
    with pytest.raises(NotOwnerError), tracker.run("left", settings=settings, run_id=run.run_id, owner=lease):
        pass
    with tracker.run("left", settings=settings, run_id=run.run_id) as goes_on:
        goes_on.log_events(STEPS)
    assert steps_in(run.run_id) == [1, 2, 3]
    assert mlflow.get_run(run.run_id).info.status == "FINISHED"


def test_an_experiment_that_another_process_makes_at_this_moment_is_used(settings, monkeypatch):
    create = mlflow.create_experiment

    def late(name, **options):
        create(name, **options)
        return create(name, **options)

    monkeypatch.setattr(mlflow, "create_experiment", late)
    made = Tracker(settings.tracking).experiment_id
    assert made == mlflow.get_experiment_by_name(settings.tracking.experiment).experiment_id


def test_a_run_that_is_gone_is_followed_by_a_new_one(tracker, settings, caplog):
    elsewhere = Tracker(settings.tracking.model_copy(update={"experiment": "elsewhere"}))
    with elsewhere.run("x", settings=settings) as other:
        pass
    tracker = Tracker(settings.tracking)
    with tracker.run("x", settings=settings) as deleted:
        pass
    mlflow.delete_run(deleted.run_id)
    opened = set()
    for run_id in (other.run_id, deleted.run_id, "0" * 32, "not an id"):
        caplog.clear()
        with tracker.run("x", settings=settings, run_id=run_id) as run:
            opened.add(run.run_id)
            assert steps_in(run.run_id) == []
        assert f"{run_id} is no longer in experiment {settings.tracking.experiment}: a new one" in caplog.text
    assert len(opened - {other.run_id, deleted.run_id}) == 4


def test_a_child_that_goes_on_moves_to_the_parent_that_is_open(tracker, settings):
    with (
        tracker.run("old parent", settings=settings) as old,
        tracker.run("x", settings=settings, parent=old.run_id) as x,
    ):
        pass
    with (
        tracker.run("parent", settings=settings) as parent,
        tracker.run("x", settings=settings, parent=parent.run_id, run_id=x.run_id),
    ):
        pass
    assert mlflow.get_run(x.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    assert {mlflow.get_run(run.run_id).info.status for run in (old, x, parent)} == {"FINISHED"}


def test_the_time_of_each_rank_is_logged_in_ms_for_each_step(tracker, settings):
    with tracker.run("ranks", settings=settings) as run:
        run.log_events([evaluation(10, ranks=RANKS), evaluation(20)])
    metrics = mlflow.get_run(run.run_id).data.metrics
    assert {key: value for key, value in metrics.items() if key.startswith("rank_")} == {
        "rank_0/data_wait_ms": 50,
        "rank_0/compute_ms": 200,
        "rank_1/data_wait_ms": 25,
        "rank_1/compute_ms": 300,
        "rank_1/all_reduce_ms": 10,
    }
    assert "train/mean_loss" not in metrics


def test_events_that_are_no_metrics_or_lack_a_field_do_not_stop_the_others(tracker, settings, caplog):
    others = [
        {"kind": "checkpoint", "time": 1.0, "step": 1, "seconds": 0.1, "bytes": 9},
        {"kind": "warning", "time": 1.0, "text": "slow"},
        {"kind": "unheard of", "time": 1.0},
        {"kind": "step", "time": 1.0, "step": 2},
        {"kind": "step", "time": 1.0, "step": 2, "loss": "much", "learning_rate": 0.1},
        evaluation(2, ranks="many"),
    ]
    with tracker.run("others", settings=settings) as run:
        run.log_events([STEPS[0], *others, STEPS[1]])
    assert steps_in(run.run_id) == [1, 2]
    assert len([record for record in caplog.records if "cannot be logged" in record.getMessage()]) == 1


def test_a_store_that_fails_at_the_end_is_waited_for(tracker, settings, monkeypatch, caplog):
    monkeypatch.setattr(outage, "AGAIN_SECONDS", 0.01)
    update, answers = mlflow.MlflowClient.set_terminated, iter([MlflowException("down")] * 3)

    def sometimes(*args, **kwargs):
        if (answer := next(answers, None)) is not None:
            raise answer
        return update(*args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "set_terminated", sometimes)
    with tracker.run("comes back", settings=settings) as run:
        pass
    assert mlflow.get_run(run.run_id).info.status == "FINISHED"
    assert len([r for r in caplog.records if "waiting up to 30 s" in r.getMessage()]) == 1


def test_system_metrics_are_sampled_until_the_run_ends_and_no_longer(settings, monkeypatch):
    """MLflow's own monitor sleeps on to its next sample, here 600 s away."""
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "600")
    sampled = settings.tracking.model_copy(update={"system_metrics": True})

    def sampling():
        return any(thread.name == "sparknorm-system-metrics" for thread in threading.enumerate())

    with Tracker(sampled).run("sampled", settings=settings):
        assert sampling()
        time.sleep(1)  # it is asleep by now
    ended = time.monotonic()
    while sampling() and time.monotonic() - ended < 10:
        time.sleep(0.01)
    assert not sampling()


def test_a_store_that_stays_down_ends_the_run_in_time(settings, monkeypatch):
    def never(*args, **kwargs):
        raise MlflowException("down")

    at_once = settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"outage_seconds": 0})})
    tracker = Tracker(at_once.tracking)
    with pytest.raises(ZeroDivisionError), tracker.run("its own error", settings=at_once):
        for name in ("set_terminated", "set_tag", "log_batch"):
            monkeypatch.setattr(mlflow.MlflowClient, name, never)
        raise ZeroDivisionError
    assert mlflow.active_run() is None
    began_at = time.monotonic()
    with (
        pytest.raises(TrackingError, match=r"log params at sqlite.* within tracking\.outage_seconds = 0: down"),
        tracker.run("never", settings=at_once),
    ):
        raise AssertionError("the block is not reached")
    assert time.monotonic() - began_at < 5
    assert mlflow.active_run() is None


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MlflowException("API request failed with exception HTTPConnectionPool"), True),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE"}), True),
        (RestException({"error_code": "REQUEST_LIMIT_EXCEEDED"}), True),
        (ConnectionResetError(), True),
        (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST"}), False),
        (RestException({"error_code": "PERMISSION_DENIED"}), False),
        (KeyError("a mistake of ours"), False),
    ],
)
def test_an_outage_is_told_from_a_refusal(error, expected):
    assert is_outage(error) == expected


def test_an_error_of_ours_is_neither_repeated_nor_renamed():
    calls = []
    with pytest.raises(KeyError):
        retry_during_outage("x", lambda: calls.append(1) or {}["missing"], 60)
    assert calls == [1]


def test_the_reason_is_the_innermost_cause_in_one_line():
    assert reason(MlflowException("Max retries\n(Caused by NewConnectionError('refused'))")).startswith("NewConnection")
    assert reason(KeyError()) == "KeyError"


def test_the_bar_takes_old_events_warnings_and_a_restart_at_once(caplog, capsys):
    old = {"kind": "start", "time": 1.0, "total_steps": 10, "epochs": 2}
    warning = {"kind": "warning", "time": 1.0, "text": "checkpoints are slow"}
    with TrainingBar("x", batch_size=32) as bar, caplog.at_level(logging.WARNING):
        bar.show([*STEPS, old, {**old, "attempt": 1, "restored_from": 0, "world_size": 2}])
        assert bar._bar.tasks[0].fields["detail"].startswith("epoch 1/2")
        bar.show([warning, {**old, "attempt": 2, "restored_from": 470}, {"kind": "checkpoint", "time": 1.0, "step": 3}])
        assert bar._bar.tasks[0].fields["detail"] == "goes on from step 470 (launch 2)"
        bar.show([warning, *STEPS])
    assert [record.getMessage() for record in caplog.records] == ["x: checkpoints are slow"]


def test_every_name_of_a_class_can_be_the_name_of_a_metric(tracker, settings):
    classes = ("dress", "T-shirt/top", "..", "", "a:b", "a;b", "ça " + 300 * "x")
    recall = (0.5, None, 0.25, 0.0, 0.125, 1.0, 0.75)
    with tracker.run("recall", settings=settings) as run:
        run.log_summary(recall_metrics(recall, classes))
    found = {name: value for name, value in mlflow.get_run(run.run_id).data.metrics.items() if "recall" in name}
    assert sorted(found.values()) == sorted(share for share in recall if share is not None)
    assert {
        "recall/00 dress": 0.5,
        "recall/02 ..": 0.25,
        "recall/03": 0.0,
        "recall/04 ab": 0.125,
    }.items() <= found.items()
    assert recall_metrics((0.5,) * 31, [str(number) for number in range(31)]) == {}


WITHOUT_SPARK = """
import sys
from pipeline.cluster import get_session
from pipeline.config.cluster import SparkSettings
from pipeline.config.settings import Settings
from pipeline.tracking import Tracker

settings = Settings.model_validate_json(sys.argv[1])
spark = get_session(SparkSettings(master="local[1]"), "sparknorm tests")
with Tracker(settings.tracking).run(settings.name, settings=settings):
    java = spark.sparkContext._gateway.proc
    java.kill()
    java.wait(30)
    raise {"FAILED": ZeroDivisionError("mine"), "KILLED": SystemExit(143)}[sys.argv[2]]
"""


@pytest.mark.spark
@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_ends_though_spark_has_ended_before(settings, tmp_path, status):
    """MLflow's client asks an active session for a registry; and what ends a command may end its Java first."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SPARK, settings.model_dump_json(), status], capture_output=True, text=True,
        timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, check=False,
    )  # fmt: skip
    assert done.returncode == {"FAILED": 1, "KILLED": 143}[status], done.stderr
    client = mlflow.MlflowClient(settings.tracking.uri)
    experiment = client.get_experiment_by_name(settings.tracking.experiment)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == status
    assert run.data.tags.get("failure") == {"FAILED": "ZeroDivisionError: mine", "KILLED": None}[status]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143), KilledError("with all others")])
def test_what_is_ended_from_outside_is_killed_and_has_not_failed(tracker, settings, error):
    with pytest.raises(type(error)), tracker.run("ended", settings=settings) as run:
        raise error
    ended = mlflow.get_run(run.run_id)
    assert ended.info.status == "KILLED"
    assert {"state", "failure"}.isdisjoint(ended.data.tags)
    assert mlflow.active_run() is None
    with tracker.run("ended", settings=settings, run_id=run.run_id):
        assert mlflow.get_run(run.run_id).info.status == "RUNNING"
    assert mlflow.get_run(run.run_id).info.status == "FINISHED"
