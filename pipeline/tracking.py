"""Events and results -> MLflow. The only importer of mlflow; it runs on the driver alone.

One `train` is one run. One `compare` is a parent run with one child for each trial.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")  # MLflow looks for git; a machine without it is fine

import mlflow
import numpy as np
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.models import infer_signature

from pipeline import storage
from pipeline.config import Settings, TrackingSettings
from pipeline.events import Event
from pipeline.manifest import Manifest

if TYPE_CHECKING:
    import torch

for _name in ("mlflow", "alembic"):
    logging.getLogger(_name).setLevel(logging.WARNING)

# MLflow takes at most these many at once.
_METRICS_AT_ONCE, _PARAMS_AT_ONCE = 1000, 100
_DIGEST_LENGTH = 36


class TrackingError(RuntimeError):
    """The tracking store cannot be used."""


class TrackedRun:
    """One open MLflow run."""

    def __init__(self, run_id: str):
        self.run_id = run_id
        self._client = mlflow.MlflowClient()
        self._last_step = self._last_evaluation = -1

    def log_events(self, events: list[Event]) -> None:
        """Steps and evaluations as metrics; what a restarted gang repeats is dropped."""
        metrics: list[Metric] = []
        step, evaluation = self._last_step, self._last_evaluation
        for event in events:
            values: dict[str, Any] = {}
            if event["kind"] == "step" and event["step"] > step:
                step = event["step"]
                values = {"train/loss": event["loss"], "train/learning_rate": event["learning_rate"]}
            elif event["kind"] == "evaluation" and event["step"] > evaluation:
                evaluation = event["step"]
                values = {
                    f"{event['split']}/accuracy": event["accuracy"],
                    f"{event['split']}/loss": event["loss"],
                    "train/mean_loss": event["train_loss"],
                    "train/images_per_second": event["images_per_second"],
                    "epoch": event["epoch"],
                }
            stamp = int(event["time"] * 1000)
            metrics += [Metric(k, v, stamp, event["step"]) for k, v in values.items() if v is not None]
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
        # Only now: if MLflow did not take them, the caller offers the same events again.
        self._last_step, self._last_evaluation = step, evaluation

    def log_params(self, params: dict[str, Any]) -> None:
        entries = [Param(key, str(value)) for key, value in params.items()]
        for start in range(0, len(entries), _PARAMS_AT_ONCE):
            self._client.log_batch(self.run_id, params=entries[start : start + _PARAMS_AT_ONCE])

    def log_summary(self, values: dict[str, Any]) -> None:
        """Final figures: numbers as metrics, the rest as tags; None is left out."""
        for key, value in values.items():
            if isinstance(value, bool) or not isinstance(value, (int, float, type(None))):
                self._client.set_tag(self.run_id, key, str(value))
            elif value is not None:
                self._client.log_metric(self.run_id, key, value)

    def log_text(self, name: str, text: str) -> None:
        self._client.log_text(self.run_id, text, name)

    def log_dataset(self, manifest: Manifest, path: str, context: str) -> None:
        """The dataset's name, digest and place as the run's input; MLflow cuts digests, so a tag has it whole."""
        source = json.dumps({"uri": storage.absolute(path)})
        digest = manifest.digest.removeprefix("sha256:")[:_DIGEST_LENGTH]
        entry = Dataset(name=manifest.name, digest=digest, source_type="local", source=source)
        tags = [InputTag("mlflow.data.context", context)]
        self._client.log_inputs(self.run_id, [DatasetInput(entry, tags)])
        self._client.set_tag(self.run_id, "dataset_digest", manifest.digest)

    def log_model(self, model: torch.nn.Module, image_shape: tuple[int, int, int]) -> None:
        """The trained model, uint8 images to logits, with signature and input example, as an exported graph.

        The `torch.export` format holds no pickled code and needs none of this package to be loaded.
        """
        import mlflow.pytorch
        import torch

        example = np.zeros((2, *image_shape), dtype=np.uint8)
        with torch.inference_mode():
            logits = model(torch.from_numpy(example)).numpy()
        mlflow.pytorch.log_model(
            model,
            name="model",
            signature=infer_signature(example, logits),
            input_example=example,
            pip_requirements=[f"torch=={torch.__version__.partition('+')[0]}", f"numpy=={np.__version__}"],
            serialization_format="pt2",
        )


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
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            mlflow.set_tracking_uri(uri)
            if mlflow.get_experiment_by_name(settings.experiment) is None:
                local = uri.startswith(("sqlite:", "file:"))
                mlflow.create_experiment(
                    settings.experiment,
                    artifact_location=Path(settings.artifacts).absolute().as_uri() if local else None,
                )
            self.experiment_id = mlflow.set_experiment(settings.experiment).experiment_id
        except (MlflowException, OSError) as error:
            raise TrackingError(f"tracking.uri {uri} cannot be used: {error}") from error

    @contextmanager
    def run(self, name: str, *, settings: Settings, parent: str | None = None, **tags: Any) -> Iterator[TrackedRun]:
        """An open run with all settings as params. It ends FINISHED, or FAILED with the reason in tag ``failure``."""
        with mlflow.start_run(
            run_name=name,
            nested=parent is not None,
            parent_run_id=parent,
            tags={key: str(value) for key, value in {**tags, **_origin()}.items()},
            log_system_metrics=self._settings.system_metrics,
        ) as active:
            run = TrackedRun(active.info.run_id)
            run.log_params(_flatten(settings.model_dump(mode="json")))
            try:
                yield run
            except BaseException as error:
                with suppress(Exception):  # the store may be what failed
                    run.log_summary({"failure": f"{type(error).__name__}: {error}"[:5000]})
                raise


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(_flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _origin() -> dict[str, str]:
    """Versions, and the git commit where there is one."""
    import pyspark
    import torch

    from pipeline import __version__

    versions = {"sparknorm": __version__, "version.torch": torch.__version__, "version.pyspark": pyspark.__version__}
    return versions | ({"mlflow.source.git.commit": commit} if (commit := _git_commit()) else {})


def _git_commit() -> str:
    """The commit this package runs from; empty where it is installed, or git is not."""
    folder = Path(__file__).parent
    if shutil.which("git") is None or not folder.is_dir():
        return ""
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""
