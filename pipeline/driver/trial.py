"""One training as the driver sees it: what was begun before, the launch, the relay of its events, the MLflow run."""

from __future__ import annotations

import threading
import uuid
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.cluster import elastic
from pipeline.config.settings import Settings
from pipeline.data.manifest import Manifest
from pipeline.driver.checks import check_trial
from pipeline.driver.record import Record, finished_record, unfinished_record
from pipeline.driver.slots import TrainingSlot
from pipeline.tracking import Tracker
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.relay import Relay
from pipeline.tracking.run import TrackedRun

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.training.hooks import Hook
    from pipeline.training.job import Job


def run_trial(
    spark: SparkSession,
    settings: Settings,
    tracker: Tracker,
    *,
    name: str,
    parent: str | None = None,
    log_model: bool = True,
    slot: TrainingSlot | None = None,
    manifest: Manifest | None = None,
    hook: Hook | None = None,
    **tags: Any,
) -> dict[str, Any]:
    """Train once and log it as one MLflow run, whatever the number of ranks or restarts, also of the driver.

    A trial of the same name, settings and dataset that was begun and not finished is continued, in its MLflow run. One
    that was finished is trained again, but within one parent run its result is returned.

    Parameters
    ----------
    slot : held while it trains; None where nothing else trains
    manifest : of the dataset, where it is loaded already
    hook : what every rank calls at the moments that `pipeline.training.hooks` documents

    Returns
    -------
    dict
        What `train.fit` returns, ``run_id`` and, where diagnostics looked at it, ``gradient_norms``: for each layer the
        norm at the first look and the median over all.

    Raises
    ------
    BusyError
        Another process is training it now.
    """
    manifest = check_trial(spark, settings, manifest)
    record, job = _begin(settings, manifest, name, parent)
    if isinstance(record.content.result, dict):
        return record.content.result
    record.claim(name)
    with ExitStack() as training:
        stop = training.enter_context(slot or TrainingSlot()).stop
        with tracker.run(name, settings=settings, parent=parent, run_id=record.content.run_id, **tags) as run:
            record.update(run_id=run.run_id)
            run.log_dataset(manifest, settings.dataset.path, context="training")
            result = _train(spark, settings, replace(job, hook=hook), run, name, stop)
            training.close()  # what is left to do needs no worker
            result |= _log_result(run, job, result)
            if log_model and not result["diverged"] and not record.content.model:
                _log_model(run, job, manifest)
                record.update(model=True)
    result = {**result, "run_id": run.run_id}
    record.update(result=result)
    return result


def _train(
    spark: SparkSession, settings: Settings, job: Job, run: TrackedRun, name: str, stop: threading.Event
) -> dict[str, Any]:
    """Launch it, and pass on what it tells while it lasts."""
    from pipeline.training import checkpoint
    from pipeline.training.job import TOKEN, facts
    from pipeline.training.loop import fit

    checkpoints = storage.join(job.folder, "checkpoints")
    storage.publish(storage.join(job.folder, TOKEN), job.token.encode())
    with (
        TrainingBar(name, settings.train.global_batch) as bar,
        Relay(storage.join(job.folder, "events"), run, bar),
    ):
        results = elastic.run(
            spark,
            fit,
            (job,),
            workers=settings.workers,
            sizes=job.train.world_sizes.__contains__,
            saved_step=lambda: checkpoint.newest_step(checkpoints),
            facts=facts,
            folder=job.folder,
            stop=stop,
        )
    return results[0].model_dump(mode="json")


def _log_result(run: TrackedRun, job: Job, result: dict[str, Any]) -> dict[str, Any]:
    """The final figures and, where diagnostics looked, their pictures; what those add to the result."""
    from pipeline.report.figures.diagnostics import draw, gradient_norms
    from pipeline.telemetry.events import EventReader

    run.log_summary({key: value for key, value in result.items() if not isinstance(value, list)})
    if job.train.diagnostics.every_steps is None:
        return {}
    events = EventReader(storage.join(job.folder, "events")).new()
    run.log_files("diagnostics", draw(events))
    return {"gradient_norms": [entry.model_dump() for entry in gradient_norms(events)]}


def _begin(settings: Settings, manifest: Manifest, name: str, parent: str | None) -> tuple[Record, Job]:
    """The record of this trial, and its job in the record's folder.

    What the folder is called after does not depend on the number of workers: a training goes on when that is changed.
    """
    from pipeline.training.job import Job, identity

    job = Job(
        storage.absolute(settings.dataset.path),
        "",
        settings.model,
        settings.train,
        reader=settings.reader,
        version=manifest.version,  # also after a restart, whatever is appended meanwhile
        token=uuid.uuid4().hex,
        checkpoint=settings.checkpoint,
    )
    trials = storage.join(storage.absolute(settings.output), "trials")
    key = {"parent": parent, **identity(job)}
    record = (finished_record(trials, name, key) if parent else None) or unfinished_record(trials, name, key)
    return record, replace(job, folder=record.folder)


def _log_model(run: TrackedRun, job: Job, manifest: Manifest) -> None:
    import torch

    from models import build_model
    from pipeline.training import checkpoint
    from pipeline.training.job import identity

    state = checkpoint.load_newest(
        storage.join(job.folder, "checkpoints"), identity=identity(job), device=torch.device("cpu")
    )
    if state is None:
        raise checkpoint.CheckpointError(f"{job.folder}/checkpoints has no whole checkpoint after training")
    model = build_model(job.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    model.load_state_dict(state["model"])
    run.log_model(model.eval(), manifest.image.shape)
