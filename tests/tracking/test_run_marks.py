"""A run whose opener died, or lost the store's answer, before it knew the run's id is found again by its mark."""

import shutil
import subprocess
import sys

import mlflow
import pytest
from requests.exceptions import ConnectionError as ConnectionLostError
from standalone_cluster import REPOSITORY

from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.tracking.tracker import Tracker

# A process that is killed when the run is open and no param is logged.
KILLED = """
import os, signal, sys
from pipeline.config.settings import Settings
from pipeline.tracking.run import TrackedRun
from pipeline.tracking.tracker import Tracker

TrackedRun.log_params = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
settings = Settings.model_validate_json(sys.argv[1])
with Tracker(settings.tracking).run("killed", settings=settings, mark="a mark"):
    pass
"""


@pytest.fixture
def settings(empty_store, tmp_path):
    shutil.copy(empty_store, tmp_path)
    uri, artifacts = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "artifacts")
    tracking = TrackingSettings(uri=uri, artifacts=artifacts, system_metrics=False, outage_seconds=30)
    return Settings(name="small", tracking=tracking)


def runs_of(tracker):
    return mlflow.search_runs([tracker.experiment_id], output_format="list")


def test_the_run_of_a_process_that_was_killed_at_its_start_goes_on(settings):
    command = [sys.executable, "-c", KILLED, settings.model_dump_json()]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == -9
    tracker = Tracker(settings.tracking)
    (left,) = runs_of(tracker)
    assert (left.info.status, left.data.params) == ("RUNNING", {})
    with tracker.run("killed", settings=settings, mark="a mark") as run:
        assert run.run_id == left.info.run_id
    (ended,) = runs_of(tracker)
    assert (ended.info.status, ended.data.params["train.seed"]) == ("FINISHED", str(settings.train.seed))


def test_a_run_of_which_only_the_answer_was_lost_is_not_opened_twice(settings, monkeypatch):
    tracker, create, calls = Tracker(settings.tracking), mlflow.MlflowClient.create_run, []

    def created_and_lost(*args, **kwargs):
        run = create(*args, **kwargs)
        calls.append(run.info.run_id)
        raise ConnectionLostError("Remote end closed connection without response")

    monkeypatch.setattr(mlflow.MlflowClient, "create_run", created_and_lost)
    with tracker.run("lost", settings=settings, mark="a mark") as run:
        assert [run.run_id] == calls
    (ended,) = runs_of(tracker)
    assert ended.info.status == "FINISHED"


def test_another_mark_or_a_run_that_was_deleted_is_a_new_run(settings):
    tracker, ids = Tracker(settings.tracking), []
    for mark in ("one", "other", None, None):
        with tracker.run("new", settings=settings, mark=mark) as run:
            ids.append(run.run_id)
    mlflow.delete_run(ids[0])
    with tracker.run("new", settings=settings, mark="one") as run:
        ids.append(run.run_id)
    assert len(set(ids)) == 5
