"""One training as the driver sees it: what was begun before, the launch, the relay of its events, the MLflow run."""

from __future__ import annotations

import uuid
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import elastic, storage
from pipeline.config import Settings
from pipeline.manifest import Manifest
from pipeline.manifest import load as load_manifest
from pipeline.progress import TrainingBar
from pipeline.record import Record, find_record
from pipeline.relay import Relay
from pipeline.tracking import TrackedRun, Tracker

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.job import Job


def check_trial(spark: SparkSession, settings: Settings) -> Manifest:
    """Everything that can be wrong is found before a run is opened or a worker launched. Returns the manifest.

    Raises
    ------
    ValueError
        Dataset, batch size, lanes, network and norm do not fit each other.
    LaunchError
        There are fewer slots than workers.
    """
    from models import build_model
    from pipeline.feed import check_data

    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    check_data(manifest, settings.train, settings.reader, settings.workers.count)
    build_model(settings.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    elastic.world_size(spark, settings.workers, settings.train.lanes)
    return manifest


def run_trial(
    spark: SparkSession,
    settings: Settings,
    tracker: Tracker,
    *,
    name: str,
    parent: str | None = None,
    log_model: bool = True,
    **tags: Any,
) -> dict[str, Any]:
    """Train once and log it as one MLflow run, whatever the number of ranks or restarts, also of the driver.

    A trial of the same name, settings and dataset that was begun and not finished is continued, in its MLflow run. One
    that was finished is trained again, but within one parent run its result is returned.

    Returns
    -------
    dict
        What `train.fit` returns, and ``run_id``.

    Raises
    ------
    BusyError
        Another process is training it now.
    """
    from pipeline.diagnostic_plots import draw
    from pipeline.events import EventReader
    from pipeline.job import TOKEN

    manifest = check_trial(spark, settings)
    record, job = _begin(settings, manifest, name, parent)
    if record.finished:
        return record.data["result"]
    record.claim(name=name)
    with tracker.run(name, settings=settings, parent=parent, run_id=record.data.get("run_id"), **tags) as run:
        record.update(run_id=run.run_id)
        run.log_dataset(manifest, settings.dataset.path, context="training")
        storage.publish(storage.join(job.folder, TOKEN), job.token.encode())
        with (
            TrainingBar(name, settings.train.global_batch) as bar,
            Relay(storage.join(job.folder, "events"), run, bar),
        ):
            result = elastic.train(spark, job, settings.workers)
        run.log_summary({key: value for key, value in result.items() if not isinstance(value, list)})
        if settings.train.diagnostics.every_steps is not None:
            run.log_pictures("diagnostics", draw(EventReader(storage.join(job.folder, "events")).new()))
        if log_model and not result["diverged"] and "model" not in record.data:
            _log_model(run, job, manifest)
            record.update(model=True)
    result = {**result, "run_id": run.run_id}
    record.update(result=result)
    return result


def _begin(settings: Settings, manifest: Manifest, name: str, parent: str | None) -> tuple[Record, Job]:
    """The record of this trial, and its job in the record's folder.

    What the folder is called after does not depend on the number of workers: a training goes on when that is changed.
    """
    from pipeline.job import Job, identity

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
    record = find_record(trials, name, {"parent": parent, **identity(job)}, finished_too=parent is not None)
    return record, replace(job, folder=record.folder)


def _log_model(run: TrackedRun, job: Job, manifest: Manifest) -> None:
    import torch

    from models import build_model
    from pipeline import checkpoint
    from pipeline.job import identity

    state = checkpoint.load_newest(
        storage.join(job.folder, "checkpoints"), identity=identity(job), device=torch.device("cpu")
    )
    if state is None:
        raise checkpoint.CheckpointError(f"{job.folder}/checkpoints has no whole checkpoint after training")
    model = build_model(job.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    model.load_state_dict(state["model"])
    run.log_model(model.eval(), manifest.image.shape)
