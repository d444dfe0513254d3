"""One training as the driver sees it: launch the barrier stage, relay its events, log the run."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pipeline import barrier, storage
from pipeline.config import Settings
from pipeline.events import Event, EventReader
from pipeline.manifest import Manifest
from pipeline.manifest import load as load_manifest
from pipeline.progress import TrainingBar
from pipeline.tracking import TrackedRun, Tracker

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

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
    from pipeline.feed import check_data

    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    check_data(manifest, settings.train, settings.reader, settings.workers.count)
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
    from pipeline.train import TOKEN, Job, facts, fit

    manifest = check_trial(spark, settings)
    with tracker.run(name, settings=settings, parent=parent, **tags) as run:
        run.log_dataset(manifest, settings.dataset.path, context="training")
        folder = storage.join(storage.absolute(settings.output), "trials", run.run_id)
        job = Job(
            storage.absolute(settings.dataset.path),
            folder,
            settings.model,
            settings.train,
            reader=settings.reader,
            version=manifest.version,  # also after a restart, whatever is appended meanwhile
            token=run.run_id,
        )
        storage.publish(storage.join(folder, TOKEN), job.token.encode())
        with (
            TrainingBar(name, settings.train.batch_size) as bar,
            _relay(storage.join(folder, "events"), run, bar),
        ):
            result = barrier.run(spark, fit, (job,), workers=settings.workers, facts=facts)[0]
        run.log_summary({key: value for key, value in result.items() if not isinstance(value, list)})
        if log_model and not result["diverged"]:
            _log_model(run, job, manifest)
        return {**result, "run_id": run.run_id}


@contextmanager
def _relay(folder: str, run: TrackedRun, bar: TrainingBar) -> Iterator[None]:
    """Hand the events that workers publish to MLflow and to the bar while the block runs, and the rest when it ends.

    Events that MLflow does not take are kept and offered again; only if it takes none at the very end is that an error.
    """
    reader, stop = EventReader(folder), threading.Event()
    waiting: list[Event] = []

    def pass_on() -> None:
        events = reader.new()
        waiting.extend(events)
        bar.show(events)
        if waiting:
            run.log_events(waiting)
            waiting.clear()

    def loop() -> None:
        warned = False
        while not stop.wait(RELAY_SECONDS):
            try:
                pass_on()
            except Exception as error:  # noqa: BLE001 - offered again, and raised by the last call
                if not warned:
                    log.warning("metrics could not be passed on and will be offered again: %s", error)
                warned = True

    thread = threading.Thread(target=loop, name="sparknorm-relay", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        stop.set()
        thread.join()
        with suppress(Exception):  # the training's own error is the one to show
            pass_on()
        raise
    stop.set()
    thread.join()  # bounded by the storage's and MLflow's own timeouts
    pass_on()


def _log_model(run: TrackedRun, job: Any, manifest: Manifest) -> None:
    import torch

    from models import build_model
    from pipeline import checkpoint
    from pipeline.train import facts

    state = checkpoint.load_newest(
        storage.join(job.folder, "checkpoints"), identity=facts(job), device=torch.device("cpu")
    )
    if state is None:
        raise checkpoint.CheckpointError(f"{job.folder}/checkpoints has no whole checkpoint after training")
    model = build_model(job.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    model.load_state_dict(state["model"])
    run.log_model(model.eval(), manifest.image.shape)
