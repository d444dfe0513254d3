"""What was evaluated within a training, as models of MLflow: each has its step, its metrics and the dataset.

Weights lie in MLflow of the network alone that a training ends with. Those of other states lie in the checkpoints that
are kept, if they do: a model says where, and is what MLflow calls an external one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import mlflow
from mlflow.entities import LoggedModelOutput, Metric

from pipeline.config.secrets import mask
from pipeline.data.manifest import Manifest
from pipeline.tracking.run import TrackedRun, dataset_digest

# An evaluation is some calls to MLflow: of more than so many states the first are left out, but for the best.
MOST_STATES = 100
STEP_TAG, BEST_TAG, CHECKPOINT_TAG = "sparknorm.step", "sparknorm.best", "sparknorm.checkpoint"


@dataclass(frozen=True)
class EvaluatedState:
    """A network as it was evaluated.

    step : optimizer steps before
    metrics : by name, without those that are not finite
    checkpoint : path of the file with its weights; None where that is not kept
    """

    step: int
    metrics: Mapping[str, float]
    checkpoint: str | None = None


def link_metrics(run: TrackedRun, model_id: str, state: EvaluatedState, manifest: Manifest, split: str) -> None:
    """Log the metrics of a state, as ``model/accuracy``, with the model and the dataset that they are of."""
    stamp = int(time.time() * 1000)
    metrics = [
        Metric(f"model/{key}", value, stamp, state.step, model_id, manifest.name, dataset_digest(manifest), run.run_id)
        for key, value in state.metrics.items()
    ]
    client = mlflow.MlflowClient()
    run.call("link metrics to a model", partial(client.log_batch, run.run_id, metrics=metrics))
    tags = {STEP_TAG: str(state.step), "sparknorm.split": split}
    run.call("tag a model", partial(client.set_logged_model_tags, model_id, tags))


def log_states(
    run: TrackedRun, states: Sequence[EvaluatedState], best: int, manifest: Manifest, split: str
) -> dict[int, str]:
    """Log each state as a model of its step; the id of each by its step. Those that MLflow has are left as they are.

    Parameters
    ----------
    best : step of the state that was best, which is said of it in a tag
    split : that the metrics are of
    """
    client = mlflow.MlflowClient()
    experiment = run.call("find a run", lambda: client.get_run(run.run_id)).info.experiment_id
    search = partial(client.search_logged_models, [experiment], f"source_run_id = '{run.run_id}'", max_results=1000)
    known = {
        int(model.tags[STEP_TAG]): model.model_id
        for model in run.call("look for models", search)
        if STEP_TAG in model.tags
    }
    newest = {state.step for state in states[-MOST_STATES:]} | {best}
    for state in states:
        if state.step not in newest or state.step in known:
            continue
        tags = {CHECKPOINT_TAG: mask(state.checkpoint)} if state.checkpoint else {}
        make = partial(
            mlflow.create_external_model,
            name=f"step-{state.step}",
            source_run_id=run.run_id,
            tags=tags,
            experiment_id=experiment,
        )
        model_id = run.call("log a model", make).model_id
        output = [LoggedModelOutput(model_id, state.step)]
        run.call("link a model to its run", partial(client.log_outputs, run.run_id, output))
        link_metrics(run, model_id, state, manifest, split)
        known[state.step] = model_id
    if best in known:
        name = partial(client.set_logged_model_tags, known[best], {BEST_TAG: "true"})
        run.call("name the best model", name)
    return known
