"""One training as the driver sees it: launch the barrier stage, relay its events, log the run."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pipeline import barrier, checkpoint, storage
from pipeline.config import Settings
from pipeline.events import Event, EventReader
from pipeline.manifest import Manifest
from pipeline.manifest import load as load_manifest
from pipeline.progress import TrainingBar
from pipeline.tracking import TrackedRun, Tracker

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

RELAY_SECONDS = 0.5


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
    from pipeline.train import check_job

    manifest = load_manifest(settings.dataset.path)
    check_job(manifest, settings.train, settings.workers.count)
    build_model(settings.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    barrier.wait_for_slots(spark, settings.workers)
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
    """Train once and log it as one MLflow run, whatever the number of ranks or restarts.

    Returns
    -------
    dict
        What `train.fit` returns, and ``run_id``.
    """
    from pipeline.train import Job, facts, fit

    manifest = check_trial(spark, settings)
    with tracker.run(name, settings=settings, parent=parent, **tags) as run:
        run.log_dataset(manifest, settings.dataset.path, context="training")
        folder = storage.join(storage.absolute(settings.output), "trials", run.run_id)
        job = Job(storage.absolute(settings.dataset.path), folder, settings.model, settings.train)
        with (
            TrainingBar(name, settings.train.batch_size) as bar,
            _relay(storage.join(folder, "events"), run.log_events, bar.show),
        ):
            result = barrier.run(spark, fit, (job,), workers=settings.workers, facts=facts)[0]
        run.log_summary({key: value for key, value in result.items() if not isinstance(value, list)})
        if log_model and not result["diverged"]:
            _log_model(run, job, manifest)
        return {**result, "run_id": run.run_id}


@contextmanager
def _relay(folder: str, *sinks: Callable[[list[Event]], None]) -> Iterator[None]:
    """Hand the events that workers publish to the sinks while the block runs, and the rest when it ends."""
    reader, stop = EventReader(folder), threading.Event()
    problems: list[Exception] = []

    def pass_on() -> None:
        if events := reader.new():
            for sink in sinks:
                sink(events)

    def loop() -> None:
        try:
            while not stop.wait(RELAY_SECONDS):
                pass_on()
        except Exception as error:  # noqa: BLE001 - raised below, in the thread that waits
            problems.append(error)

    thread = threading.Thread(target=loop, name="sparknorm-relay", daemon=True)
    thread.start()

    def finish() -> None:
        stop.set()
        thread.join(timeout=60)
        if problems:
            raise problems[0]
        pass_on()

    try:
        yield
    except BaseException:
        with suppress(Exception):  # the training's own error is the one to show
            finish()
        raise
    finish()


def _log_model(run: TrackedRun, job: Any, manifest: Manifest) -> None:
    import torch

    from models import build_model
    from pipeline.train import facts

    state = checkpoint.load_newest(
        storage.join(job.folder, "checkpoints"), identity=facts(job), device=torch.device("cpu")
    )
    if state is None:
        raise checkpoint.CheckpointError(f"{job.folder}/checkpoints has no whole checkpoint after training")
    model = build_model(job.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    model.load_state_dict(state["model"])
    run.log_model(model.eval(), manifest.image.shape)
