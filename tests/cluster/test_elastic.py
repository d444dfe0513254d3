"""Executors that are gone for good, more workers than before, and a tracking server that goes away while it trains."""

import dataclasses
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow_server import MlflowServer
from pyspark import cloudpickle
from small_training import TWO, Running, equal, events, final_state, launch, make_job, make_settings, steps_not_told
from standalone_cluster import WorkerOffer, run_driver, standalone_cluster

from pipeline.cluster import WorkerError, elastic
from pipeline.cluster.errors import LaunchError, ShortageError
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.driver.trial import run_trial
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.spark
cloudpickle.register_pickle_by_value(sys.modules[__name__])

DRIVER = """
import dataclasses, json, sys
from pathlib import Path
from small_training import TWO, launch, make_job
from standalone_cluster import driver_session

master, dataset, folder = sys.argv[1:]
spark = driver_session(master, {"spark.python.daemon.module": "pipeline.daemon"})
for name, count, least in (("fewer", 4, 1), ("none", 2, None)):
    workers = TWO.model_copy(update={"count": count, "min_count": least, "slots_wait_seconds": 8})
    outcome = launch(spark, make_job(dataset, f"{folder}/{name}", epochs=16), workers)
    Path(folder, f"{name}.json").write_text(json.dumps(outcome.values()))
"""


@pytest.fixture(scope="module")
def losses(dataset, tmp_path_factory):
    """The folder of two trainings on a standalone cluster. The first has four workers on two executors, one of three
    cores and one of one, and loses the small one; the second has two on the other, and loses that."""
    folder = tmp_path_factory.mktemp("losses")
    with (
        standalone_cluster([WorkerOffer(cores=3), WorkerOffer(cores=1)], folder) as cluster,
        ThreadPoolExecutor(1) as pool,
    ):
        driver = pool.submit(run_driver, DRIVER, cluster.master, dataset, str(folder), timeout=400)
        for name, worker in (("fewer", 1), ("none", 0)):
            running = Running(folder / name)
            driver.add_done_callback(lambda _, running=running: running.ended.set())
            running.at_step(40)
            running.saved(26)
            cluster.kill_worker(worker)
            Running(folder).wait_until("it ended", (folder / f"{name}.json").exists)
        driver.result(timeout=60)
    return folder


def test_with_fewer_workers_it_goes_on_from_the_checkpoint(losses, dataset):
    outcome = json.loads((losses / "fewer.json").read_text())
    assert outcome["error"] == ""
    result = outcome["result"]
    assert result["world_size"] == 2  # three cores are left, and three workers do not divide four lanes
    job = make_job(dataset, losses / "fewer", epochs=16)
    starts = [(start["world_size"], start["restored_from"]) for start in events(job, "start")]
    assert starts[0] == (4, 0)
    assert starts[-1][0] == 2
    assert starts[-1][1] > 25
    assert steps_not_told(job, result["steps"]) == []


def test_where_that_is_not_wanted_it_fails_with_the_reason(losses):
    outcome = json.loads((losses / "none.json").read_text())
    assert outcome["error_type"] == "ShortageError"
    assert "workers.count is 2, but spark://" in outcome["error"]
    assert "has 0 slots" in outcome["error"]
    assert outcome["seconds"] < 120


def count_to_four(worker, folder, fails_at):
    """It saves each step, and fails once behind each of these."""
    saved = Path(folder, f"saved-{worker.rank}")
    for step in range(int(saved.read_text()) + 1 if saved.exists() else 1, 5):
        saved.write_text(str(step))
        worker.wait_for_all()
        if step in fails_at:
            raise KeyError(f"behind step {step}")
    return worker.rank, worker.world_size


def count(spark, folder, *fails_at, workers=TWO, **more):
    def saved_step():
        saved = Path(folder, "saved-0")
        return int(saved.read_text()) if saved.exists() else 0

    args = (str(folder), fails_at)
    return elastic.run(spark, count_to_four, args, workers=workers, **{"saved_step": saved_step, **more})


def test_any_function_goes_on_from_what_it_has_saved(spark, tmp_path, caplog):
    assert count(spark, tmp_path, 1, 3) == [(0, 2), (1, 2)]
    assert [r.message.partition("; ")[2] for r in caplog.records if r.name == "pipeline.cluster.elastic"] == [
        "going on from step 1 with 2 workers",
        "going on from step 3 with 2 workers",
    ]


def test_a_function_that_has_saved_nothing_new_is_not_launched_again(spark, tmp_path):
    with pytest.raises(WorkerError, match="KeyError: 'behind step 1'"):
        count(spark, tmp_path, 1, 2, saved_step=elastic.nothing_saved)
    assert Path(tmp_path, "saved-0").read_text() == "1"


def save_and_lose_it(worker, folder):
    """What it saves in one launch is gone in the next: there is something else each time, and never anything new."""
    worker.wait_for_all()
    if worker.rank == 0:
        saved = Path(folder, "saved-0")
        saved.write_text("0" if saved.exists() and saved.read_text() == "1" else "1")
        with Path(folder, "launches").open("a") as launches:
            launches.write("x")
    worker.wait_for_all()
    raise KeyError("lost")


def test_launches_without_a_new_step_have_an_end(spark, tmp_path, monkeypatch):
    """0.7.0 launched it for ever."""
    monkeypatch.setattr(elastic, "LAUNCHES", 2)

    def saved_step():
        saved = Path(tmp_path, "saved-0")
        return int(saved.read_text()) if saved.exists() else 0

    words = "launched 2 times since step 1 was saved, and no later step was: "
    with pytest.raises(LaunchError, match=words + r".* They ended .*on 2 workers: .*KeyError: 'lost'"):
        elastic.run(spark, save_and_lose_it, (str(tmp_path),), workers=TWO, saved_step=saved_step)
    assert Path(tmp_path, "launches").read_text() == "xxx"  # one with a new step, two without


def test_the_error_of_a_launch_is_not_hidden_by_storage_that_fails_after_it(spark, tmp_path, caplog):
    steps = iter([0])

    def saved_step():
        for step in steps:
            return step
        raise OSError("storage is gone")

    with pytest.raises(WorkerError, match="KeyError: 'behind step 1'"):
        count(spark, tmp_path, 1, saved_step=saved_step)
    assert "not launched again, since what was saved cannot be read: storage is gone" in caplog.text


def test_a_function_runs_on_the_workers_that_there_are_and_that_fit_it(spark, tmp_path):
    workers = TWO.model_copy(update={"count": 3, "min_count": 1, "slots_wait_seconds": 0})
    assert count(spark, tmp_path, workers=workers) == [(0, 2), (1, 2)]
    assert count(spark, tmp_path, workers=workers, sizes=lambda count: count % 2 == 1) == [(0, 1)]


def test_more_workers_go_on_where_one_was(spark, dataset, tmp_path):
    """A training of one worker is stopped and continued by two."""
    job = make_job(dataset, tmp_path / "job")
    one = TWO.model_copy(update={"count": 1})
    first = launch(spark, job, one, hook=stop_at_step_60)
    assert "KeyError: 'stopped'" in first.error
    second = launch(spark, job, TWO)
    assert second.error == ""
    assert second.result.world_size == 2
    assert [start["restored_from"] for start in events(job, "start")][-1] >= 57
    assert {event["step"] for event in events(job, "step")} == set(range(1, second.result.steps + 1))


def test_the_batch_of_all_workers_stays_where_that_of_one_was_given_and_a_worker_is_missing(spark, dataset, tmp_path):
    """The size of a worker's batch is the usual setting; it was made for two workers, and one is left."""
    jobs = [make_job(dataset, tmp_path / name, epochs=2) for name in ("both", "one")]
    for_two = TrainSettings(**jobs[0].train.model_dump() | {"batch_size": None, "rank_batch_size": 16}).for_workers(2)
    by_lane = ModelSettings(depth=3, width=4, norm="batch", norm_statistics="lane")  # the same ones on one worker
    jobs = [dataclasses.replace(job, train=for_two, model=by_lane) for job in jobs]
    outcomes = [launch(spark, job, TWO.model_copy(update={"count": n})) for n, job in zip((2, 1), jobs, strict=True)]
    assert [outcome.error for outcome in outcomes] == ["", ""]
    assert outcomes[0].result.steps == outcomes[1].result.steps
    assert {job.train.global_batch for job in jobs} == {32}
    for left, right in zip(*(final_state(job)["model"].values() for job in jobs), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)


def stop_at_step_60(moment):
    if moment.name == "checkpoint_begun":
        moment.wait_until_written()  # a state that is due waits for the one before: none is late here
    if moment.name == "before_data" and moment.step == 60:
        raise KeyError("stopped")


@pytest.mark.parametrize(
    ("least", "slots", "expected"),
    [(1, 8, 8), (1, 7, 4), (2, 3, 2), (4, 4, 4), (None, 8, 8)],
)
def test_the_largest_number_that_fits_and_divides_the_lanes(monkeypatch, least, slots, expected):
    workers = TWO.model_copy(update={"count": 8, "min_count": least})
    monkeypatch.setattr(elastic.resources, "wait_for_slots", lambda *_: shortage(slots) if slots < 8 else None)
    assert elastic.world_size(None, workers, sizes=divides_16) == expected


@pytest.mark.parametrize(("least", "slots"), [(None, 7), (4, 3), (1, 0)])
def test_too_few_for_the_least_number_is_an_error(monkeypatch, least, slots):
    workers = TWO.model_copy(update={"count": 8, "min_count": least})
    monkeypatch.setattr(elastic.resources, "wait_for_slots", lambda *_: shortage(slots))
    with pytest.raises(ShortageError):
        elastic.world_size(None, workers, sizes=divides_16)


def divides_16(count):
    return 16 % count == 0


def shortage(slots):
    raise ShortageError(f"there are {slots} slots", slots)


@contextmanager
def closing_server(folder):
    server = MlflowServer(folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.mark.slow
def test_a_tracking_server_that_goes_away_and_comes_back_misses_nothing(spark, dataset, tmp_path):
    job = make_job(dataset, tmp_path / "by-hand", epochs=24)
    with closing_server(tmp_path) as server:
        settings = make_settings(job, tmp_path / "runs", server.uri, "outage")
        tracker = Tracker(settings.tracking)
        trials = tmp_path / "runs" / "trials"

        def interrupt():
            waiting = Running(trials)
            folder = waiting.wait_until("a trial", lambda: next(iter(trials.glob("*/")), None))
            Running(folder).at_step(60)
            server.kill()
            Running(folder).at_step(150)
            server.start()

        thread = threading.Thread(target=interrupt, daemon=True)
        thread.start()
        result = run_trial(spark, settings, tracker, name="outage", log_model=False)
        thread.join(120)
        assert not thread.is_alive()
        client = mlflow.MlflowClient(server.uri)
        steps = [metric.step for metric in client.get_metric_history(result.run_id, "train/loss")]
        assert steps == list(range(1, result.steps + 1))
        assert client.get_run(result.run_id).info.status == "FINISHED"
    assert result.attempts == 1  # the training did not notice
    undisturbed = launch(spark, job)
    assert undisturbed.result.curve == result.curve
    assert equal(final_state(job), final_state(make_job(dataset, next(iter(trials.glob("*/"))), epochs=24)))
