"""The network that a training has ended with, and what was evaluated on the way, as models of MLflow."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.config.import_path import is_import_path
from pipeline.data.manifest import Manifest

if TYPE_CHECKING:
    from pipeline.config.study import LogModels
    from pipeline.driver.trial import BegunTrial
    from pipeline.report.comparison import TrialResult
    from pipeline.tracking.run import TrackedRun

log = logging.getLogger(__name__)

_SCORES = ("accuracy", "loss", "balanced_accuracy", "macro_f1", "calibration_error")


def log_models(run: TrackedRun, trial: BegunTrial, result: TrialResult, manifest: Manifest, which: LogModels) -> None:
    """Log what ``tracking.log_models`` asks for, once for each training.

    Raises
    ------
    TrackingError
        MLflow is down, or refuses it.
    """
    from pipeline.tracking.logged_models import EvaluatedState, link_metrics, log_states

    split = trial.job.train.evaluate_on
    step = result.steps if result.selected_step is None else result.selected_step
    values = {name: getattr(result, f"final_{name}") for name in _SCORES}
    if (model_id := _log_final(run, trial, manifest, step)) is not None:
        link_metrics(run, model_id, EvaluatedState(step, _finite(values)), manifest, split)
    if which == "evaluated" and result.curve:
        folder = storage.join(trial.job.folder, "checkpoints")
        kept = set(storage.names(folder))
        states = []
        for point in result.curve:
            file = f"step-{point.step:08d}.pt"
            path = storage.join(folder, file) if file in kept else None
            states.append(EvaluatedState(point.step, _finite({n: getattr(point, n) for n in _SCORES}), path))
        best = max(result.curve, key=lambda point: (point.accuracy, -point.step))
        log_states(run, states, best.step, manifest, split)
    trial.record.update(model=True)


def _finite(values: dict[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}


def _log_final(run: TrackedRun, trial: BegunTrial, manifest: Manifest, step: int) -> str | None:
    """The id of the model with the trained network; None where it is one's own, and torch.export cannot follow it."""
    import torch

    from models.saved_state import load_saved
    from pipeline.training import checkpoint
    from pipeline.training.network import network_for
    from pipeline.training.own_network import export_problem

    checkpoints = storage.join(trial.job.folder, "checkpoints")
    state = checkpoint.load_newest(checkpoints, identity=trial.identity, device=torch.device("cpu"))
    if state is None:
        raise checkpoint.CheckpointError(f"{checkpoints} has no whole checkpoint after training")
    model = network_for(trial.job.model, manifest)
    load_saved(model, state["model"])
    if is_import_path(trial.job.model.network) and (reason := export_problem(model.eval(), manifest.image.shape)):
        log.warning(
            "%s cannot be logged to MLflow, since torch.export cannot follow it: %s; its checkpoint is in %s",
            trial.job.model.network, reason, checkpoints,
        )  # fmt: skip
        return None
    return run.log_model(model.eval(), manifest.image.shape, step=step)
