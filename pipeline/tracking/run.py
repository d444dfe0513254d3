"""One open MLflow run: events and results become metrics, tags, artifacts and a model."""

from __future__ import annotations

import json
import logging
import posixpath
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import mlflow
import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, Run, RunTag
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from pipeline import storage
from pipeline.config.secrets import mask, masked
from pipeline.data.manifest import Manifest
from pipeline.telemetry.events import Event, metric_values
from pipeline.tracking.client import call_store, time_to_upload
from pipeline.tracking.outage import Answer, NotOwnerError

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

# MLflow takes at most these many at once.
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
_DIGEST_LENGTH = 36
# While MLflow logs a model, it and torch.export exchange functions of the whole process for others.
_one_model_at_a_time = threading.Lock()


class Ownership(Protocol):
    """Says whether this process is the one that writes in a run, or another one goes on with it."""

    def holds(self, *, lately: bool = False) -> bool:
        """Whether it is, or an error where nobody knows. With ``lately`` a look a few seconds ago is enough."""


class SoleOwner:
    """The ownership of a run that no other process knows of."""

    def holds(self, *, lately: bool = False) -> bool:
        return True


def _is_metric_name(key: str) -> bool:
    """Whether MLflow takes it. One that it refuses would keep all events that are offered with it from being logged."""
    return bool(re.fullmatch(r"[\w\-. /:]{1,250}", key)) and posixpath.normpath(key) == key and key[0] not in "./"


def dataset_digest(manifest: Manifest) -> str:
    """The digest of a dataset as MLflow takes it, which is short."""
    return manifest.digest.removeprefix("sha256:")[:_DIGEST_LENGTH]


class TrackedRun:
    """One open MLflow run.

    Every call but `log_events` waits up to ``outage_seconds`` for a store that is down, and then raises TrackingError;
    it raises NotOwnerError where another process goes on with the run, and then changes nothing.
    Texts reach MLflow with their secrets masked.

    Parameters
    ----------
    earlier
        What MLflow already has of the run, if it is one that goes on.
    owner
        Asked before each call.
    """

    def __init__(
        self, run_id: str, *, outage_seconds: float, earlier: Run | None = None, owner: Ownership | None = None
    ):
        self.run_id = run_id
        self._owner = owner or SoleOwner()
        self.outage_seconds = outage_seconds
        self._client = mlflow.MlflowClient()
        # The newest point of each metric, as MLflow itself keeps it: thousands of steps need not be read.
        points = earlier.data.to_proto().metrics if earlier else []
        self._last_steps = {point.key: point.step for point in points}
        self._last_values = {point.key: point.value for point in points}
        self._params = dict(earlier.data.params) if earlier else {}
        self._unreadable = False

    def log_events(self, events: Sequence[Event]) -> None:
        """Log steps and evaluations as metrics, in one try.

        What MLflow has already is dropped: the events of a restarted gang, those of a run that goes on, or those
        offered again after an error. Where another process goes on with the run, it passes them on.

        Raises
        ------
        MlflowException, OSError
            MLflow did not take all of them; offer the same events again.
        """
        if not self._owner.holds(lately=True):
            return
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
        """The metrics of an event; none where it lacks what its kind has: no training ends for that."""
        try:
            stamp = int(event["time"] * 1000)
            values = {key: float(value) for key, value in metric_values(event).items() if value is not None}
            if unfit := [key for key in values if not _is_metric_name(key)]:
                raise ValueError(f"{unfit[0]!r} cannot be the name of a metric")
            return [Metric(key, value, stamp, event["step"]) for key, value in values.items()]
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            if not self._unreadable:
                log.warning("an event of kind %r cannot be logged: %s: %s", event["kind"], type(error).__name__, error)
            self._unreadable = True
            return []

    def log_params(self, params: Mapping[str, object]) -> None:
        """Log the params that the run does not have yet: MLflow never changes one."""
        entries = [Param(key, str(value)) for key, value in masked(dict(params)).items() if key not in self._params]
        for start in range(0, len(entries), _PARAMS_AT_ONCE):
            batch = entries[start : start + _PARAMS_AT_ONCE]
            self._call("log params", partial(self._client.log_batch, self.run_id, params=batch))

    def log_summary(self, values: Mapping[str, object]) -> None:
        """Log final figures: numbers as metrics, the rest as tags; None is left out, and what the run already has."""
        stamp = int(time.time() * 1000)
        tags, metrics = [], []
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                tags.append(RunTag(key, mask(str(value))))
            elif value is not None and self._last_values.get(key) != value:
                metrics.append(Metric(key, value, stamp, 0))
        self._call("log results", lambda: self._client.log_batch(self.run_id, metrics=metrics, tags=tags))

    def log_text(self, name: str, text: str) -> None:
        """Store a text as an artifact."""
        with time_to_upload():
            self._call(f"store {name}", lambda: self._client.log_text(self.run_id, text, name))

    def log_files(self, folder: str | None, files: dict[str, bytes]) -> None:
        """Store files, by their names, as artifacts in a folder of the run; None is the run itself."""
        with tempfile.TemporaryDirectory() as local, time_to_upload():
            for name, content in files.items():
                Path(local, name).write_bytes(content)
            store = partial(self._client.log_artifacts, self.run_id, local, folder)
            self._call(f"store {', '.join(files)}", store)

    def log_dataset(self, manifest: Manifest, path: str, context: str) -> None:
        """Log the dataset's name, digest and place as the run's input; MLflow cuts digests, so a tag has it whole."""
        source = json.dumps({"uri": mask(storage.absolute(path))})
        entry = Dataset(name=manifest.name, digest=dataset_digest(manifest), source_type="local", source=source)
        tags = [InputTag("mlflow.data.context", context)]
        inputs = [DatasetInput(entry, tags)]

        def log() -> None:
            try:
                self._client.log_inputs(self.run_id, inputs)
            except MlflowException:  # another run brought the same dataset at this moment: now MLflow finds it
                self._client.log_inputs(self.run_id, inputs)

        self._call("log the dataset", log)
        self.log_summary({"dataset_digest": manifest.digest})

    def log_model(self, model: torch.nn.Module, image_shape: tuple[int, int, int], *, step: int = 0) -> str:
        """Log the trained model, uint8 images to logits, with signature and input example, as an exported graph, and
        return its id. It is the model of ``step`` optimizer steps.

        The `torch.export` format holds no pickled code and needs none of this package to be loaded.
        """
        import mlflow.pytorch
        import torch

        example = np.zeros((2, *image_shape), dtype=np.uint8)
        with torch.inference_mode():
            logits = model(torch.from_numpy(example)).numpy()
        versions = [f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"]
        with _one_model_at_a_time, time_to_upload():
            params = self._call("read params", lambda: self._client.get_run(self.run_id).data.params)
            # It is made once, and a store that fails later gets the same one again.
            begin = partial(mlflow.initialize_logged_model, "model", self.run_id, params=params)
            model_id = self._call("begin a model", begin).model_id
            store = partial(
                mlflow.pytorch.log_model,
                model,
                model_id=model_id,
                step=step,
                signature=infer_signature(example, logits),
                input_example=example,
                pip_requirements=versions,
                serialization_format="pt2",
            )
            self._call("store the model", store)
        return model_id

    def call(self, what: str, call: Callable[[], Answer]) -> Answer:
        """The answer to a call of MLflow's client about this run, made as this class makes its own."""
        return self._call(what, call)

    def terminate(self, status: str, failure: str = "") -> None:
        """Mark the run as ended, with the reason of a failure, in one try each.

        It needs no Spark, which may have ended: a new client of MLflow's would ask the session for a registry.

        Raises
        ------
        MlflowException, OSError
            The store does not take the status.
        """
        if failure:
            with suppress(Exception):  # the status counts for more
                self._client.set_tag(self.run_id, "failure", mask(failure)[:5000])
        self._client.set_terminated(self.run_id, status)

    def require_ownership(self, *, lately: bool = False) -> None:
        """Raise NotOwnerError where another process goes on with the run. ``lately`` is that of `Ownership.holds`."""
        if not self._owner.holds(lately=lately):
            raise NotOwnerError(f"another process goes on with MLflow run {self.run_id}")

    def _call(self, what: str, call: Callable[[], Answer]) -> Answer:
        self.require_ownership(lately=True)  # a log may come late, and storage is not asked each time
        return call_store(what, call, self.outage_seconds)
