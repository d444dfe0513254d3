"""Trials beside each other on real Spark: they overlap, keep their order, and stop together."""

import itertools
import threading
import time
from pathlib import Path

import mlflow
import pytest

from pipeline.cluster import barrier
from pipeline.cluster.errors import LaunchError, StoppedError
from pipeline.cluster.stop import Stop
from pipeline.config.cluster import WorkerSettings
from pipeline.config.study import CompareSettings
from pipeline.driver import record, slots
from pipeline.driver.lease import TakenOverError
from pipeline.study import compare
from pipeline.telemetry.events import EventReader
from pipeline.training.checkpoint import newest_step

ONE, TWO = WorkerSettings(count=1), WorkerSettings(count=2)


def alone(settings, **compare_settings):
    """Settings whose trials are single workers: two fit on the session's two slots."""
    return settings.with_values({"workers.count": 1}).model_copy(
        update={"compare": CompareSettings(**{"seeds": (0,), **compare_settings})}
    )


@pytest.mark.spark
@pytest.mark.parametrize(
    ("workers", "wanted", "expected"),
    [([ONE], None, 2), ([TWO], None, 1), ([ONE, TWO], None, 1), ([ONE], 1, 1), ([ONE], 9, 2)],
)
def test_as_many_as_the_slots_hold(spark, workers, wanted, expected):
    assert slots.trials_at_once(spark, workers, wanted) == expected


@pytest.mark.spark
def test_results_come_in_order_and_never_more_train_than_may_at_once(spark):
    training, most, lock = [], [], threading.Lock()

    def trial(number):
        def run(slot):
            with slot:
                with lock:
                    training.append(number)
                    most.append(len(training))
                time.sleep(0.3 if number % 2 else 0.1)
                with lock:
                    training.remove(number)
            return number

        return run

    assert slots.run_all(spark, [trial(number) for number in range(9)], at_once=3) == list(range(9))
    assert max(most) == 3


@pytest.mark.spark
def test_the_next_trial_trains_while_one_logs_what_it_made(spark):
    began = {}

    def trial(number):
        def run(slot):
            with slot:
                began[number] = time.monotonic()
            if number == 0:  # it logs until the third, for which there was no slot, trains
                deadline = time.monotonic() + 30
                while 2 not in began and time.monotonic() < deadline:
                    time.sleep(0.01)
            return 2 in began

        return run

    assert slots.run_all(spark, [trial(number) for number in range(3)], at_once=2)[0]


def test_a_slot_that_comes_free_when_all_must_stop_is_not_taken():
    free, stop = threading.Semaphore(1), Stop()
    stop.set()
    with pytest.raises(StoppedError, match="another trial failed"), slots.TrainingSlot(free, stop):
        pass
    assert free.acquire(blocking=False)  # it is still free


@pytest.mark.spark
def test_a_study_side_by_side_has_the_results_of_one_after_the_other(spark, settings, tmp_path):
    """The same numbers, whatever trains beside; and the trials did overlap."""
    grid = {"model.norm": ("none", "batch"), "train.learning_rate": (0.05, 0.1)}
    both = compare(spark, alone(settings, grid=grid, seeds=(0, 1)))
    single = compare(
        spark,
        alone(settings, grid=grid, seeds=(0, 1), side_by_side=1).model_copy(
            update={"output": str(tmp_path / "single")}
        ),
    )
    assert (both.side_by_side, single.side_by_side) == (2, 1)
    for one, other in zip(both.runs, single.runs, strict=True):
        for key in ("arm", "seed", "tuned", "curve", "train_loss", "steps_to_target"):
            assert getattr(one, key) == getattr(other, key)
    client = mlflow.MlflowClient(settings.tracking.uri)
    for comparison, overlap in ((both, True), (single, False)):
        spans = sorted(
            (client.get_run(run.run_id).info.start_time, client.get_run(run.run_id).info.end_time)
            for run in comparison.runs
        )
        assert any(late[0] < early[1] for early, late in itertools.pairwise(spans)) is overlap
        parents = {client.get_run(run.run_id).data.tags["mlflow.parentRunId"] for run in comparison.runs}
        assert parents == {comparison.mlflow.parent_run_id}


@pytest.mark.spark
def test_the_first_error_stops_the_others_at_once(spark, settings, tmp_path, monkeypatch):
    """One trial of two fails while the other is in the middle of a training that would last for minutes."""
    long = alone(settings, grid={"model.norm": ("none", "batch")}).with_values({"train.epochs": 5000})
    study = long.model_copy(update={"compare": CompareSettings(grid={"model.norm": ("none", "batch")}, seeds=(0,))})
    launch, launched = barrier.run, threading.Barrier(2)

    def fail_one(*args, **options):
        launched.wait(timeout=60)
        if "batch" in options["folder"]:
            folder = next(Path(settings.output, "trials").glob("*none*"))
            deadline = time.monotonic() + 60
            while not list(folder.glob("events/*")) and time.monotonic() < deadline:
                time.sleep(0.1)  # the other one has made steps
            raise LaunchError("executors were lost")
        return launch(*args, **options)

    monkeypatch.setattr(barrier, "run", fail_one)
    started = time.monotonic()
    with pytest.raises(LaunchError, match="executors were lost"):
        compare(spark, study)
    assert time.monotonic() - started < 150
    client = mlflow.MlflowClient(settings.tracking.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == settings.tracking.experiment]
    reasons = sorted(run.data.tags["failure"] for run in client.search_runs([experiment.experiment_id]))
    assert reasons == [
        "LaunchError: executors were lost", "LaunchError: executors were lost",
        "StoppedError: the training was stopped, since another one failed",
    ]  # fmt: skip
    assert barrier.run is fail_one
    monkeypatch.undo()
    assert len(barrier.run(spark, rank_of, workers=TWO)) == 2  # no slot is left occupied


@pytest.mark.spark
def test_a_study_that_was_stopped_goes_on_with_all_that_it_had_begun(spark, settings, monkeypatch):
    """Two trainings beside each other are lost in the middle; the same call goes on with both, in their own runs."""
    longer = settings.with_values({"train.epochs": 24, "train.learning_rate": 0.02, "checkpoint.every_steps": 5})
    study = alone(longer, grid={"model.norm": ("none", "batch")})
    launch = barrier.run

    def lose(*args, **options):
        """The training, until it and the other have a checkpoint."""
        stop = Stop()
        watch = threading.Thread(target=lambda: (both_have_saved(study), stop.set()), daemon=True)
        watch.start()
        try:
            return launch(*args, **options | {"stop": stop})
        except StoppedError as error:
            raise LaunchError("executors were lost") from error

    monkeypatch.setattr(barrier, "run", lose)
    with pytest.raises(LaunchError, match="executors were lost"):
        compare(spark, study)
    monkeypatch.undo()
    reached = {folder: newest_step(f"{folder}/checkpoints") for folder in Path(study.output, "trials").glob("*/")}
    done = compare(spark, study)
    assert len(reached) == 2
    for folder, step in reached.items():
        events = EventReader(f"{folder}/events").new()
        starts = [event["restored_from"] for event in events if event["kind"] == "start"]
        assert len(starts) == 2
        assert starts[1] >= step > starts[0] == 0  # Spark needs a moment to end what it was told to end
        assert {event["step"] for event in events if event["kind"] == "step"} == set(range(1, done.runs[0].steps + 1))
    client = mlflow.MlflowClient(settings.tracking.uri)
    (experiment,) = [e for e in client.search_experiments() if e.name == settings.tracking.experiment]
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.run_id for run in runs} == {
        done.mlflow.parent_run_id, *(run.run_id for run in done.runs)
    }  # fmt: skip
    assert {run.info.status for run in runs} == {"FINISHED"}


@pytest.mark.spark
def test_a_study_that_was_taken_over_stops_its_trials_and_leaves_its_runs_as_they_are(spark, settings, monkeypatch):
    """Another driver takes it over while two trials train beside each other, which would last for minutes."""
    monkeypatch.setattr(record, "LEASE_SECONDS", 1.5)
    long = settings.with_values({"train.epochs": 5000, "checkpoint.every_steps": 5})
    study = alone(long, grid={"model.norm": ("none", "batch")})

    def take_over():
        both_have_saved(study)
        (first,) = Path(study.output, "studies").glob("*/record.json")
        first.with_name("record-0002.json").write_bytes(first.read_bytes())

    threading.Thread(target=take_over, daemon=True).start()
    with pytest.raises(TakenOverError, match=r"/studies/\S+ was taken over by process"):
        compare(spark, study)
    client = mlflow.MlflowClient(settings.tracking.uri)
    runs = client.search_runs([client.get_experiment_by_name(settings.tracking.experiment).experiment_id])
    assert [(run.info.status, "failure" in run.data.tags) for run in runs] == [("RUNNING", False)] * 3
    assert len(barrier.run(spark, rank_of, workers=TWO)) == 2  # no slot is left occupied


def both_have_saved(study):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        steps = [newest_step(str(folder)) for folder in Path(study.output, "trials").glob("*/checkpoints")]
        if len(steps) == 2 and min(steps) >= 10:
            return
        time.sleep(0.02)


def rank_of(worker):
    return worker.rank
