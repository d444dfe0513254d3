"""The tracking store and the life of its runs: opened, gone on with, ended. It runs on the driver alone.

One `train` is one run. One `compare` is a parent run with one child for each trial.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities import LifecycleStage, Run
from mlflow.exceptions import MlflowException

from pipeline.cluster.errors import KilledError, PrunedError
from pipeline.config.secrets import mask
from pipeline.config.settings import Settings
from pipeline.config.study import TrackingSettings
from pipeline.storage.writable import check_writable
from pipeline.tracking.client import (
    alone_in_store,
    call_store,
    leave_active_run,
    local_path,
    open_database,
    store_name,
)
from pipeline.tracking.outage import NotOwnerError, RefusedError, TrackingError, reason
from pipeline.tracking.provenance import origin, params_of
from pipeline.tracking.run import Ownership, SoleOwner, TrackedRun

log = logging.getLogger(__name__)

# The tag that holds what a run's opener has written down before there was a run.
MARK = "sparknorm.mark"
_SAMPLE_AGAIN_SECONDS = 10.0


class Tracker:
    """The tracking store and experiment of the settings.

    Raises
    ------
    TrackingError
        The store cannot be opened; the setting is named.
    NotWritableError
        Its folder on this machine, or that of its artifacts, cannot be written; the setting is named.
    """

    def __init__(self, settings: TrackingSettings):
        self._settings = settings
        uri = settings.uri
        try:
            mlflow.set_tracking_uri(uri)
            open_database(uri)
            with alone_in_store(uri):
                if mlflow.get_experiment_by_name(settings.experiment) is None:
                    _create_experiment(settings)
                experiment = mlflow.set_experiment(settings.experiment)
        except (MlflowException, OSError) as error:
            hint = "is an MLflow server running there? " if uri.startswith("http") else ""
            raise TrackingError(f"tracking.uri {store_name()} cannot be used: {hint}{reason(error)}") from error
        self.experiment_id = experiment.experiment_id
        if _is_on_this_machine(uri) and (artifacts := local_path(experiment.artifact_location)):
            check_writable("tracking.artifacts", str(artifacts))  # the experiment may be of other settings
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
        mark: str | None = None,
        run_id: str | None = None,
        owner: Ownership | None = None,
        **tags: Any,
    ) -> Iterator[TrackedRun]:
        """Open a run with all settings as params (see `params_of`) while the block runs.

        It ends FINISHED, KILLED where the command was ended from outside (Ctrl-C, SIGTERM, KilledError), KILLED with
        the tag ``state: pruned`` where a search has pruned it (PrunedError), or FAILED with the reason in tag
        ``failure``; one that ``owner`` says to be another process's is left as it is.

        With ``run_id`` that run goes on, or the one that was opened with the same ``mark``, which a caller can write
        down before there is an id; if neither is in the experiment, a new one is opened, so what counts afterwards is
        the ``run_id`` of the run returned.

        Raises
        ------
        TrackingError
            The store was down for ``tracking.outage_seconds`` when the run was opened or ended, or refuses it.
        """
        run = self._open(name, parent, mark, run_id, {**tags, **origin()}, owner or SoleOwner())
        ended = threading.Event()
        if self._settings.system_metrics:
            threading.Thread(
                target=_sample_system, args=(run.run_id, ended), name="sparknorm-system-metrics", daemon=True
            ).start()
        try:
            run.log_params(params_of(settings, varied))
            yield run
            run.require_ownership()
        except PrunedError:
            try:
                run.log_summary({"state": "pruned"})
            except BaseException:
                _end_early(run, "KILLED")
                raise
            _end(run, "KILLED")  # as MLflow's own searches do
            raise
        except (KeyboardInterrupt, SystemExit, KilledError):
            _end_early(run, "KILLED")
            raise
        except BaseException as error:
            _end_early(run, "FAILED", failure=f"{type(error).__name__}: {error}")
            raise
        else:
            _end(run, "FINISHED")
        finally:
            ended.set()

    def _open(
        self,
        name: str,
        parent: str | None,
        mark: str | None,
        run_id: str | None,
        tags: Mapping[str, object],
        owner: Ownership,
    ) -> TrackedRun:
        """Open a new run, or the one with this id or mark again, and make it MLflow's active one."""
        seconds = self._settings.outage_seconds
        known = self._find(run_id) if run_id else None
        if mark:
            tags = {**tags, MARK: mark}
        if parent:
            tags = {**tags, "mlflow.parentRunId": parent}  # of a run that goes on, MLflow itself would not set it

        def start() -> tuple[str, Run | None]:
            if not owner.holds():
                raise NotOwnerError(f"another process goes on with {name}")
            # Looked for at each try: of one that failed the store may have a run, and only its answer was lost.
            earlier = known or (self._find_marked(mark) if mark else None)
            opened = mlflow.start_run(
                run_id=earlier.info.run_id if earlier else None,
                run_name=mask(name),
                nested=parent is not None,
                parent_run_id=parent,
                tags={key: mask(str(value)) for key, value in tags.items()},
                log_system_metrics=False,
            )
            return opened.info.run_id, earlier

        opened, earlier = call_store("open a run", start, seconds)
        if earlier and "failure" in earlier.data.tags:
            with suppress(MlflowException, OSError):  # a blemish, not worth the run
                mlflow.MlflowClient().delete_tag(opened, "failure")
        return TrackedRun(opened, outage_seconds=seconds, earlier=earlier, owner=owner)

    def _find_marked(self, mark: str) -> Run | None:
        marked = f"tags.`{MARK}` = '{mark}'"
        found = mlflow.search_runs([self.experiment_id], marked, max_results=1, output_format="list")
        return found[0] if found else None

    def _find(self, run_id: str) -> Run | None:
        """The run if it can go on: it exists, is not deleted, and is of this experiment."""
        try:
            run = call_store("find a run", lambda: mlflow.get_run(run_id), self._settings.outage_seconds)
            if run.info.lifecycle_stage == LifecycleStage.ACTIVE and run.info.experiment_id == self.experiment_id:
                return run
        except RefusedError as error:
            log.debug("%s", error)
        log.warning(
            "MLflow run %s is no longer in experiment %s: a new one is opened", run_id, self._settings.experiment
        )
        return None


def _is_on_this_machine(uri: str) -> bool:
    """Whether this process itself decides where a store's artifacts go, and writes them; a server decides else."""
    return not uri.startswith(("http", "databricks"))


def _create_experiment(settings: TrackingSettings) -> None:
    where = Path(settings.artifacts).absolute().as_uri() if _is_on_this_machine(settings.uri) else None
    if where is not None:
        check_writable("tracking.artifacts", settings.artifacts)
    try:
        mlflow.create_experiment(settings.experiment, artifact_location=where)
    except MlflowException:
        if mlflow.get_experiment_by_name(settings.experiment) is None:  # else another process has made it meanwhile
            raise


def _end(run: TrackedRun, status: str) -> None:
    """Mark the active run as ended, and wait for a store that is down."""
    try:
        mlflow.end_run(status)
    except (MlflowException, OSError):  # it is no longer MLflow's active run: to call this again would end its parent
        call_store(f"mark a run as {status.lower()}", partial(run.terminate, status), run.outage_seconds)


def _end_early(run: TrackedRun, status: str, failure: str = "") -> None:
    """Mark the active run as failed or killed, with the reason, in one try each: the store may be what failed."""
    try:
        run.require_ownership()
    except Exception as doubt:  # noqa: BLE001 - drivers of storage raise kinds of their own
        leave_active_run()
        if not isinstance(doubt, NotOwnerError):
            log.warning("MLflow run %s is left as it is, since another driver may have it: %s", run.run_id, doubt)
        return
    try:
        run.terminate(status, failure)
    except Exception as problem:  # noqa: BLE001 - what ends the run is the error to show
        log.warning("MLflow run %s could not be marked as %s: %s", run.run_id, status, reason(problem))
    leave_active_run()


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
