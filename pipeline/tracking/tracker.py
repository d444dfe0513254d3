"""Events and results -> MLflow. The only importer of mlflow; it runs on the driver alone.

One `train` is one run. One `compare` is a parent run with one child for each trial.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sqlite3
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow looks for git; a machine without it is fine

import mlflow
import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag, LifecycleStage, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from pipeline import storage
from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.data.manifest import Manifest
from pipeline.telemetry.events import Event, metric_values
from pipeline.tracking.outage import Answer, RefusedError, TrackingError, patiently, reason
from pipeline.tracking.provenance import origin, params_of

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
for _name, _level in (("mlflow", logging.WARNING), ("alembic", logging.WARNING), ("mlflow.system_metrics", 100)):
    logging.getLogger(_name).setLevel(_level)
# A traceback for each call to a database that is down; we get the error itself, and say it once.
logging.getLogger("mlflow.store.db.utils").setLevel(100)
# MLflow's own tables ask SQLAlchemy for it, whatever one does with them.
warnings.filterwarnings("ignore", "The ``noload`` loader strategy", DeprecationWarning, module=r"mlflow\.")
# It writes a line for each new try of each call; we say once that the server is down.
logging.getLogger("urllib3.connectionpool").addFilter(lambda record: "/mlflow/" not in record.getMessage())

# MLflow takes at most these many at once.
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
_DIGEST_LENGTH = 36
_SAMPLE_AGAIN_SECONDS = 10.0

# MLflow's client tries a call to a dead server 8 times, two minutes each, before it says so. Here a call ends after 2
# tries of 6 s: what is urgent fails soon, and what can wait is offered again from this side, where a person is told
# about it. Values that the user has set stay.
_TIMEOUT, _CALL_SECONDS, _UPLOAD_SECONDS = "MLFLOW_HTTP_REQUEST_TIMEOUT", "6", "120"
_RETRIES = "MLFLOW_HTTP_REQUEST_MAX_RETRIES"
os.environ.setdefault(_TIMEOUT, _CALL_SECONDS)
os.environ.setdefault(_RETRIES, "1")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # standard output is for a result's path

_uploads: list[int] = []  # the threads that do it now
_uploads_lock = threading.Lock()
# While MLflow logs a model, it and torch.export exchange functions of the whole process for others.
_one_model_at_a_time = threading.Lock()


def _open_database(uri: str) -> None:
    """Make the folder of a SQLite store, and open a store that is a database once: MLflow itself tries for minutes."""
    path = Path(uri.removeprefix("sqlite:///"))
    try:
        if uri.startswith("sqlite:///"):
            path.parent.mkdir(parents=True, exist_ok=True)
            with closing(sqlite3.connect(path)) as database:
                database.execute("PRAGMA user_version")
        elif uri.startswith(("postgresql", "mysql", "mssql")):
            import sqlalchemy

            sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool).connect().close()
    except Exception as error:  # each driver raises kinds of its own, or is not installed
        raise OSError(reason(error)) from error


def store_name() -> str:
    """The tracking URI in use, without a password that it may contain."""
    return re.sub(r"//[^/@]*@", "//", mlflow.get_tracking_uri())


def _patiently(what: str, call: Callable[[], Answer], seconds: float) -> Answer:
    return patiently(f"{what} at {store_name()}", call, seconds)


class TrackedRun:
    """One open MLflow run. ``found`` is what MLflow already has of it, if it is one that goes on.

    Every call but `log_events` waits up to ``outage_seconds`` for a store that is down, and then raises TrackingError.
    """

    def __init__(self, run_id: str, *, outage_seconds: float, found: Run | None = None):
        self.run_id = run_id
        self.outage_seconds = outage_seconds
        self._client = mlflow.MlflowClient()
        # The newest point of each metric, as MLflow itself keeps it: thousands of steps need not be read.
        points = found.data.to_proto().metrics if found else []
        self._last_steps = {point.key: point.step for point in points}
        self._last_values = {point.key: point.value for point in points}
        self._params = dict(found.data.params) if found else {}
        self._unreadable = False

    def log_events(self, events: list[Event]) -> None:
        """Steps and evaluations as metrics, in one try. What MLflow has already is dropped: the events of a restarted
        gang, those of a run that goes on, or those offered again after an error.

        Raises
        ------
        MlflowException, OSError
            MLflow did not take all of them; offer the same events again.
        """
        last = dict(self._last_steps)
        metrics: list[Metric] = []
        for event in events:
            for metric in self._metrics(event):
                if metric.step > last.get(metric.key, -1):
                    metrics.append(metric)
                    last[metric.key] = metric.step
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            batch = metrics[start : start + _METRICS_AT_ONCE]
            self._client.log_batch(self.run_id, metrics=batch)
            self._last_steps.update((metric.key, metric.step) for metric in batch)  # only now: MLflow has them

    def _metrics(self, event: Event) -> list[Metric]:
        """An event that lacks what its kind has gives none: the training must not end for it, nor the relay stop."""
        try:
            stamp = int(event["time"] * 1000)
            return [Metric(k, float(v), stamp, event["step"]) for k, v in metric_values(event).items() if v is not None]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if not self._unreadable:
                log.warning("an event of kind %r cannot be logged: %s: %s", event["kind"], type(error).__name__, error)
            self._unreadable = True
            return []

    def log_params(self, params: dict[str, Any]) -> None:
        """Those that the run does not have yet: MLflow never changes one."""
        entries = [Param(key, str(value)) for key, value in params.items() if key not in self._params]
        for start in range(0, len(entries), _PARAMS_AT_ONCE):
            batch = entries[start : start + _PARAMS_AT_ONCE]
            self._patiently("log params", partial(self._client.log_batch, self.run_id, params=batch))

    def log_summary(self, values: dict[str, Any]) -> None:
        """Final figures: numbers as metrics, the rest as tags; None is left out, and what the run already has."""
        stamp = int(time.time() * 1000)
        tags, metrics = [], []
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                tags.append(RunTag(key, str(value)))
            elif value is not None and self._last_values.get(key) != value:
                metrics.append(Metric(key, value, stamp, 0))
        self._patiently("log results", lambda: self._client.log_batch(self.run_id, metrics=metrics, tags=tags))

    def log_text(self, name: str, text: str) -> None:
        with _time_to_upload():
            self._patiently(f"store {name}", lambda: self._client.log_text(self.run_id, text, name))

    def log_files(self, folder: str, files: dict[str, bytes]) -> None:
        """Files by name, as artifacts in a folder of the run."""
        with tempfile.TemporaryDirectory() as place, _time_to_upload():
            for name, content in files.items():
                Path(place, name).write_bytes(content)
            store = partial(self._client.log_artifacts, self.run_id, place, folder)
            self._patiently(f"store {', '.join(files)}", store)

    def log_dataset(self, manifest: Manifest, path: str, context: str) -> None:
        """The dataset's name, digest and place as the run's input; MLflow cuts digests, so a tag has it whole."""
        source = json.dumps({"uri": storage.absolute(path)})
        digest = manifest.digest.removeprefix("sha256:")[:_DIGEST_LENGTH]
        entry = Dataset(name=manifest.name, digest=digest, source_type="local", source=source)
        tags = [InputTag("mlflow.data.context", context)]
        inputs = [DatasetInput(entry, tags)]

        def log() -> None:
            try:
                self._client.log_inputs(self.run_id, inputs)
            except MlflowException:  # another run brought the same dataset at this moment: now MLflow finds it
                self._client.log_inputs(self.run_id, inputs)

        self._patiently("log the dataset", log)
        self.log_summary({"dataset_digest": manifest.digest})

    def log_model(self, model: torch.nn.Module, image_shape: tuple[int, int, int]) -> None:
        """The trained model, uint8 images to logits, with signature and input example, as an exported graph.

        The `torch.export` format holds no pickled code and needs none of this package to be loaded.
        """
        import mlflow.pytorch
        import torch

        example = np.zeros((2, *image_shape), dtype=np.uint8)
        with torch.inference_mode():
            logits = model(torch.from_numpy(example)).numpy()
        versions = [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"]
        with _one_model_at_a_time, _time_to_upload():
            params = self._patiently("read params", lambda: self._client.get_run(self.run_id).data.params)
            # It is made once, and a store that fails later gets the same one again.
            begin = partial(mlflow.initialize_logged_model, "model", self.run_id, params=params)
            store = partial(
                mlflow.pytorch.log_model,
                model,
                model_id=self._patiently("begin a model", begin).model_id,
                signature=infer_signature(example, logits),
                input_example=example,
                pip_requirements=versions,
                serialization_format="pt2",
            )
            self._patiently("store the model", store)

    def _patiently(self, what: str, call: Callable[[], Answer]) -> Answer:
        return _patiently(what, call, self.outage_seconds)


class Tracker:
    """The tracking store and experiment of the settings.

    Raises
    ------
    TrackingError
        The store cannot be opened; the setting is named.
    """

    def __init__(self, settings: TrackingSettings):
        self._settings = settings
        uri = settings.uri
        try:
            mlflow.set_tracking_uri(uri)
            _open_database(uri)
            if mlflow.get_experiment_by_name(settings.experiment) is None:
                local = not uri.startswith(("http", "databricks"))
                mlflow.create_experiment(
                    settings.experiment,
                    artifact_location=Path(settings.artifacts).absolute().as_uri() if local else None,
                )
            self.experiment_id = mlflow.set_experiment(settings.experiment).experiment_id
        except (MlflowException, OSError) as error:
            hint = "is an MLflow server running there? " if uri.startswith("http") else ""
            raise TrackingError(f"tracking.uri {store_name()} cannot be used: {hint}{reason(error)}") from error
        if settings.system_metrics and importlib.util.find_spec("psutil") is None:
            raise TrackingError("tracking.system_metrics needs the package psutil: install it, or set it to false")

    @contextmanager
    def run(
        self,
        name: str,
        *,
        settings: Settings,
        varied: Mapping[str, Sequence[Any]] | None = None,
        parent: str | None = None,
        run_id: str | None = None,
        **tags: Any,
    ) -> Iterator[TrackedRun]:
        """An open run with all settings as params (see `params_of`).

        It ends FINISHED, or FAILED with the reason in tag ``failure``.

        With ``run_id`` that run goes on; if it is no longer in the experiment, a new one is opened, so what counts
        afterwards is the ``run_id`` of the run returned.

        Raises
        ------
        TrackingError
            The store was down for ``tracking.outage_seconds`` when the run was opened or ended, or refuses it.
        """
        seconds = self._settings.outage_seconds
        run = self._open(name, parent, run_id, {**tags, **origin()})
        ended = threading.Event()
        if self._settings.system_metrics:
            threading.Thread(
                target=_sample_system, args=(run.run_id, ended), name="sparknorm-system-metrics", daemon=True
            ).start()
        try:
            run.log_params(params_of(settings, varied))
            yield run
        except BaseException as error:
            _end_failed(run.run_id, error)
            raise
        else:
            _end(run.run_id, seconds)
        finally:
            ended.set()

    def _open(self, name: str, parent: str | None, run_id: str | None, tags: dict[str, Any]) -> TrackedRun:
        """Open a new run, or the one with this id again, and make it MLflow's active one."""
        seconds = self._settings.outage_seconds
        found = self._find(run_id) if run_id else None
        if parent:
            tags = {**tags, "mlflow.parentRunId": parent}  # of a run that goes on, MLflow itself would not set it

        def start() -> str:
            return mlflow.start_run(
                run_id=found.info.run_id if found else None,
                run_name=name,
                nested=parent is not None,
                parent_run_id=parent,
                tags={key: str(value) for key, value in tags.items()},
                log_system_metrics=False,
            ).info.run_id

        opened = _patiently("open a run", start, seconds)
        if found and "failure" in found.data.tags:
            with suppress(MlflowException, OSError):  # a blemish, not worth the run
                mlflow.MlflowClient().delete_tag(opened, "failure")
        return TrackedRun(opened, outage_seconds=seconds, found=found)

    def _find(self, run_id: str) -> Run | None:
        """The run if it can go on: it exists, is not deleted, and is of this experiment."""
        try:
            found = _patiently("find a run", lambda: mlflow.get_run(run_id), self._settings.outage_seconds)
            if found.info.lifecycle_stage == LifecycleStage.ACTIVE and found.info.experiment_id == self.experiment_id:
                return found
        except RefusedError as error:
            log.debug("%s", error)
        log.warning(
            "MLflow run %s is no longer in experiment %s: a new one is opened", run_id, self._settings.experiment
        )
        return None


def _end(run_id: str, outage_seconds: float) -> None:
    """Mark the active run as finished."""
    try:
        mlflow.end_run()
    except (MlflowException, OSError):  # it is no longer MLflow's active run: to call this again would end its parent
        client = mlflow.MlflowClient()
        _patiently("mark a run as finished", lambda: client.set_terminated(run_id, "FINISHED"), outage_seconds)


def _end_failed(run_id: str, error: BaseException) -> None:
    """Mark the active run as failed, with the reason, in one try each: the store may be what failed."""
    with suppress(Exception):
        mlflow.MlflowClient().set_tag(run_id, "failure", f"{type(error).__name__}: {error}"[:5000])
    with suppress(Exception):
        mlflow.end_run("FAILED")


def _sample_system(run_id: str, ended: threading.Event) -> None:
    """Let MLflow sample CPU, memory, disk and GPU until the run ends. MLflow's sampling ends for good when one call
    fails; this begins again."""
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

    while not ended.is_set():
        with suppress(Exception):  # the server is down, or the run was deleted: the training is what matters
            mlflow.get_run(run_id)
            monitor = SystemMetricsMonitor(run_id, resume_logging=True)
            # Without this it sleeps on between its samples, and then asks for the run's status, which stays RUNNING if
            # the server is gone.
            monitor._shutdown_event = ended
            monitor.monitor()
        ended.wait(_SAMPLE_AGAIN_SECONDS)


def longest_call_seconds() -> float:
    """A call to the store that begins now and has not ended after this time hangs: its tries, and the pauses between
    them."""
    return (1 + int(os.environ[_RETRIES])) * float(os.environ[_TIMEOUT]) + 8.0


@contextmanager
def _time_to_upload() -> Iterator[None]:
    """The server answers an upload when it has stored it, which may take longer than we give other calls. MLflow reads
    that time from the environment of the process: with uploads in several threads, the last one to end sets it back."""
    with _uploads_lock:
        ours = bool(_uploads) or os.environ.get(_TIMEOUT) == _CALL_SECONDS  # else it is the user's own value
        if ours:
            _uploads.append(threading.get_ident())
            os.environ[_TIMEOUT] = _UPLOAD_SECONDS
    try:
        yield
    finally:
        with _uploads_lock:
            if ours:
                _uploads.remove(threading.get_ident())
                if not _uploads:
                    os.environ[_TIMEOUT] = _CALL_SECONDS
