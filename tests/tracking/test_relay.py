"""Events on their way to a real MLflow server that is killed, hangs, comes back, or never does."""

import shutil
import signal
import time

import mlflow
import pytest
from mlflow_server import MlflowServer, free_port

from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.telemetry.events import EventWriter
from pipeline.tracking import relay, tracker
from pipeline.tracking.outage import TrackingError
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.relay import Relay
from pipeline.tracking.tracker import Tracker

pytestmark = pytest.mark.long

EVALUATE_EVERY = 25


@pytest.fixture(scope="module")
def one_server(empty_store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server")
    server = MlflowServer(folder, store=f"sqlite:///{shutil.copy(empty_store, folder)}")
    yield server
    server.kill()


@pytest.fixture
def server(one_server):
    """It runs, whatever the test before did to it."""
    if not one_server.running:
        one_server.start()
    return one_server


@pytest.fixture
def settings(server, request):
    tracking_settings = TrackingSettings(
        uri=server.uri, experiment=request.node.name, system_metrics=False, outage_seconds=60
    )
    return Settings(name="relay", tracking=tracking_settings)


def patient(settings, seconds):
    return settings.model_copy(update={"tracking": settings.tracking.model_copy(update={"outage_seconds": seconds})})


class Bar(TrainingBar):
    """Remembers the last step that it was shown."""

    step = 0

    def show(self, events):
        super().show(events)
        self.step = max([self.step, *(event["step"] for event in events if event["kind"] == "step")])


class Training:
    """Emits what a training emits."""

    def __init__(self, folder):
        self._writer = EventWriter(folder, 0, flush_seconds=0.1)
        self._step = 0

    def steps(self, count):
        for _ in range(count):
            self._step += 1
            self._writer.emit("step", step=self._step, loss=1 / self._step, learning_rate=0.1)
            if self._step % EVALUATE_EVERY == 0:
                self._writer.emit(
                    "evaluation", step=self._step, split="test", accuracy=0.5, loss=1.0, train_loss=1.0,
                    images_per_second=100.0, epoch=1,
                )  # fmt: skip
        self._writer.flush()


def until(condition, seconds=60):
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "it did not happen in time"
        time.sleep(0.05)


def steps_in(run_id, metric="train/loss"):
    return [point.step for point in mlflow.MlflowClient().get_metric_history(run_id, metric)]


def all_is_there_once(run_id, steps):
    assert steps_in(run_id) == list(range(1, steps + 1))
    assert steps_in(run_id, "test/accuracy") == list(range(EVALUATE_EVERY, steps + 1, EVALUATE_EVERY))


def test_a_server_that_is_killed_and_comes_back_has_each_step_once(
    server, settings, tmp_path, caplog, capfd, monkeypatch
):
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    monkeypatch.setattr(tracker, "_SAMPLE_AGAIN_SECONDS", 0.2)
    sampled = settings.tracking.model_copy(update={"system_metrics": True})
    settings = settings.model_copy(update={"tracking": sampled})
    folder = str(tmp_path / "events")
    training = Training(folder)
    with Tracker(settings.tracking).run("killed", settings=settings) as run, Bar("x", 32) as bar:
        with Relay(folder, run, bar):
            training.steps(110)
            until(lambda: steps_in(run.run_id) and steps_in(run.run_id, "system/cpu_utilization_percentage"))
            server.kill()
            training.steps(900)
            until(lambda: bar.step == 1010, seconds=10)  # it goes on while the server is down
            training.steps(10)
            time.sleep(3)
            server.start()
            sampled_before = len(steps_in(run.run_id, "system/cpu_utilization_percentage"))
            until(lambda: len(steps_in(run.run_id)) == 1020)
            training.steps(80)
        all_is_there_once(run.run_id, 1100)
        until(lambda: len(steps_in(run.run_id, "system/cpu_utilization_percentage")) > sampled_before)
    assert mlflow.get_run(run.run_id).info.status == "FINISHED"
    complaints = [record.getMessage() for record in caplog.records if record.levelname != "DEBUG"]
    assert len(complaints) == 1
    assert "MLflow does not take metrics; they are kept" in complaints[0]
    printed = capfd.readouterr().err  # MLflow's own threads and its HTTP client are silent
    assert "Retrying" not in printed
    assert "WARNING mlflow" not in printed


def test_a_server_that_hangs_stops_neither_the_bar_nor_the_trainings_own_error(server, settings, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    folder = str(tmp_path / "events")
    training = Training(folder)
    try:
        with (
            pytest.raises(ZeroDivisionError),
            Tracker(settings.tracking).run("hangs", settings=settings) as run,
            Bar("x", 32) as bar,
            Relay(folder, run, bar),
        ):
            server.signal(signal.SIGSTOP)
            training.steps(400)
            until(lambda: bar.step == 400, seconds=10)
            time.sleep(4)  # the same steps are offered more than once, and the server will hear of each offer
            server.signal(signal.SIGCONT)
            until(lambda: len(steps_in(run.run_id)) >= 400)
            server.signal(signal.SIGSTOP)
            training.steps(50)
            failed_at = time.monotonic()
            raise ZeroDivisionError
        assert time.monotonic() - failed_at < 30
    finally:
        server.signal(signal.SIGCONT)
    monkeypatch.undo()
    steps = steps_in(run.run_id)
    assert steps == list(range(1, len(steps) + 1))


def test_a_server_that_stays_down_is_an_error_and_the_next_run_passes_everything_on(server, settings, tmp_path):
    folder = str(tmp_path / "events")
    training = Training(folder)
    impatient = patient(settings, 2)
    with (
        pytest.raises(TrackingError, match=r"tracking\.outage_seconds = 2") as error,
        Tracker(impatient.tracking).run("down", settings=impatient) as run,
        Bar("x", 32) as bar,
        Relay(folder, run, bar),
    ):
        training.steps(60)
        until(lambda: steps_in(run.run_id))
        server.kill()
        training.steps(100)
        ended_at = time.monotonic()
    assert time.monotonic() - ended_at < 30
    assert folder in str(error.value)
    assert "running the same command again passes them on" in str(error.value)

    server.start()
    with Tracker(settings.tracking).run("down", settings=settings, run_id=run.run_id) as again, Bar("x", 32) as bar:
        assert again.run_id == run.run_id
        with Relay(folder, again, bar):
            pass
    all_is_there_once(run.run_id, 160)
    ended = mlflow.get_run(run.run_id)
    assert ended.info.status == "FINISHED"
    assert "failure" not in ended.data.tags


def test_a_server_that_is_down_at_the_start_is_named():
    uri = f"http://someone:secret@127.0.0.1:{free_port()}"
    began_at = time.monotonic()
    words = r"tracking\.uri http://\*\*\*@127\.0\.0\.1:\d+ .*is an MLflow server running"
    with pytest.raises(TrackingError, match=words):
        Tracker(TrackingSettings(uri=uri))
    assert time.monotonic() - began_at < 20


def test_a_run_that_mlflow_refuses_is_not_waited_for(server, settings, tmp_path):
    folder = str(tmp_path / "events")
    tracker = Tracker(settings.tracking)
    began_at = time.monotonic()
    with (
        pytest.raises(TrackingError, match="Nothing is lost"),
        tracker.run("deleted", settings=settings) as run,
        Bar("x", 32) as bar,
        Relay(folder, run, bar),
    ):
        mlflow.delete_run(run.run_id)
        Training(folder).steps(10)
    assert time.monotonic() - began_at < settings.tracking.outage_seconds / 2
    with tracker.run("deleted", settings=settings, run_id=run.run_id) as again, Bar("x", 32) as bar:
        assert again.run_id != run.run_id
        with Relay(folder, again, bar):
            pass
    assert steps_in(again.run_id) == list(range(1, 11))


def test_storage_that_fails_for_a_moment_loses_nothing(server, settings, tmp_path, monkeypatch):
    folder = str(tmp_path / "events")
    read, failures = relay.EventReader.new, iter([OSError("stale file handle")] * 3)

    def sometimes(self, *args):
        events = read(self, *args) if (failure := next(failures, None)) is None else []
        self.failure, self.complete = failure, failure is None and self.complete
        return events

    monkeypatch.setattr(relay.EventReader, "new", sometimes)
    with Tracker(settings.tracking).run("storage", settings=settings) as run, Bar("x", 32) as bar:
        with Relay(folder, run, bar):
            Training(folder).steps(30)
        all_is_there_once(run.run_id, 30)


def test_a_run_that_cannot_be_marked_as_finished_is_an_error(server, settings):
    impatient = patient(settings, 1)
    with (
        pytest.raises(TrackingError, match=r"mark a run as finished at http.* within tracking\.outage_seconds = 1"),
        Tracker(impatient.tracking).run("parent", settings=impatient),
    ):
        server.kill()
        ended_at = time.monotonic()
    assert time.monotonic() - ended_at < 30
    assert mlflow.active_run() is None
