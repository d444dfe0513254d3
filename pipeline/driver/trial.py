"""One training as the driver sees it: what was begun before, the launch, the relay of its events, the MLflow run."""

from __future__ import annotations

import logging
import re
import uuid
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.cluster import elastic
from pipeline.cluster.errors import PrunedError, StoppedError
from pipeline.cluster.stop import Stop
from pipeline.config.settings import Settings
from pipeline.config.study import LogModels
from pipeline.data.manifest import Manifest
from pipeline.driver import checks
from pipeline.driver.early_end import EarlyEnd
from pipeline.driver.lease import Lease
from pipeline.driver.record import Record, finished_record, unfinished_record
from pipeline.driver.slots import TrainingSlot
from pipeline.driver.trained_model import log_models
from pipeline.report.comparison import TrialResult
from pipeline.report.confusion import MOST_CLASSES
from pipeline.telemetry import Event, heartbeat
from pipeline.tracking import Tracker
from pipeline.tracking.progress import TrainingBar
from pipeline.tracking.relay import Relay
from pipeline.tracking.run import TrackedRun
from pipeline.training.versions import check_versions

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.training.hooks import Hook
    from pipeline.training.job import Job
    from pipeline.training.result import TrainResult

log = logging.getLogger(__name__)

TRIALS = "trials"


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
    cycle: int | None = None,
    lease: Lease | None = None,
    early_end: EarlyEnd | None = None,
    **tags: Any,
) -> TrialResult:
    """Train once and log it as one MLflow run, whatever the number of ranks or restarts, also of the driver.

    A trial of the same name, settings and dataset that was begun and not finished is continued, in its MLflow run. One
    that was finished is trained again, but within one parent run its result is returned.

    Parameters
    ----------
    name, tags : of the MLflow run; the trial and its progress bar have the same name
    parent : id of the MLflow run that this is a part of
    log_model : whether MLflow gets the models that ``tracking.log_models`` asks for
    slot : held while it trains; None where nothing else trains
    manifest : of the dataset, where it is loaded already, and has decided what was ``auto``
    hook : what every rank calls at the moments that `pipeline.training.hooks` documents
    cycle : train to the end of this cycle of the schedule, 1 is the first; a later one goes on in the same run
    lease : of the study that it is a part of; None where it needs one of its own
    early_end : sees the evaluations of the training while it lasts, and may end it; None where nobody does

    Raises
    ------
    BusyError, TakenOverError
        Another process is training it now, or has taken it over, since this one gave no sign of life.
    PrunedError
        ``early_end`` has pruned it: its MLflow run ends as KILLED with the tag ``state: pruned``.
    VersionsError
        Other versions of the packages have trained what is taken up, and ``checkpoint.other_versions`` is ``refuse``.
    """
    settings, manifest = (settings, manifest) if manifest else checks.open_dataset(settings)
    checks.check_trial(spark, settings, manifest)
    record = (trial := _begin(settings, manifest, name, parent)).record
    if known := _known_result(settings, record, name, cycle):
        return known
    job, slot = replace(trial.job, until_cycle=cycle, hook=hook, live=early_end is not None), slot or TrainingSlot()
    with _hold(record, name, lease, slot.stop) as owner, ExitStack() as training:
        training.enter_context(slot)
        with tracker.run(
            name, settings=settings, parent=parent, mark=record.content.run_mark, run_id=record.content.run_id,
            owner=owner, **tags,
        ) as run:  # fmt: skip
            record.update(run_id=run.run_id)
            run.log_dataset(manifest, settings.dataset.path, context="training")
            trained = _train(spark, settings, job, run, name, slot.stop, early_end)
            training.close()  # what is left to do needs no worker
            result = _log_end(run, trial, trained, manifest, settings.tracking.log_models if log_model else "none")
        return _preserve(record, result, cycle)


def _hold(record: Record, name: str, lease: Lease | None, stop: Stop) -> AbstractContextManager[Lease]:
    """The lease under which a trial is trained: its study's, which outlives the trial, or its own."""
    if lease is None:
        return record.claim(name, stop=stop)
    record.join(lease, name)
    return nullcontext(lease)


def _preserve(record: Record, result: TrialResult, cycle: int | None) -> TrialResult:
    """Write the result down, with a copy of the predictions at the end of a cycle: the next cycle replaces them, and a
    study that was killed needs both."""
    if cycle is not None and result.predictions is not None:
        path = storage.join(record.folder, f"predictions-cycle-{cycle}.parquet")
        storage.publish(path, storage.read_bytes(result.predictions))
        result = result.model_copy(update={"predictions": path})
    record.add_result(result, cycle)
    return result


def _known_result(settings: Settings, record: Record, name: str, cycle: int | None) -> TrialResult | None:
    """What a trial has returned already, if it has and its versions are those here or may be others."""
    if known := record.result(cycle):
        what = f"the finished training {name!r} in {record.folder}"
        check_versions(what, known.versions, settings.checkpoint.other_versions, log.warning)
    return known


@dataclass(frozen=True)
class BegunTrial:
    """A trial in its folder.

    record : what is known of it
    job : its training; the job's folder is that of the record
    identity : of the job (see `pipeline.training.job.identity`)
    """

    record: Record
    job: Job
    identity: dict[str, Any]


def newest_finished(settings: Settings, manifest: Manifest, name: str) -> BegunTrial | None:
    """The newest trial of this name, these settings and this dataset that has ended, outside of a study; or None."""
    job, key = _new_job(settings, manifest)
    record = finished_record(trials_folder(settings), name, {"parent": None, **key})
    return BegunTrial(record, replace(job, folder=record.folder), key) if record else None


def trial_in(settings: Settings, manifest: Manifest, folder: str) -> BegunTrial:
    """The trial of these settings whose folder is known, such as one of a study."""
    job, key = _new_job(settings, manifest)
    record = Record(folder)
    return BegunTrial(record, replace(job, folder=record.folder), key)


def trials_folder(settings: Settings) -> str:
    """The folder with a folder for each trial of these settings' output."""
    return storage.join(storage.absolute(settings.output), TRIALS)


def _begin(settings: Settings, manifest: Manifest, name: str, parent: str | None) -> BegunTrial:
    """The trial that goes on, or a new one.

    What its folder is called after does not depend on the number of workers: it goes on when that is changed.
    """
    job, key = _new_job(settings, manifest)
    where = trials_folder(settings), name, {"parent": parent, **key}
    record = (finished_record(*where) if parent else None) or unfinished_record(*where)
    return BegunTrial(record, replace(job, folder=record.folder), key)


def _new_job(settings: Settings, manifest: Manifest) -> tuple[Job, dict[str, Any]]:
    """A job that has no folder yet, and its identity."""
    from pipeline.training.job import Job, identity, source_identity, weights_identity

    model = settings.model
    if model.weights is not None:
        model = model.model_copy(update={"weights": storage.absolute(model.weights)})
    job = Job(
        storage.absolute(settings.dataset.path),
        "",
        model,
        settings.train,
        reader=settings.reader,
        version=manifest.version,  # also after a restart, whatever is appended meanwhile
        token=uuid.uuid4().hex,
        checkpoint=settings.checkpoint,
        source="".join(source_identity(model.network).values()),
        weights_digest="".join(weights_identity(model).values()),
    )
    return job, identity(job, manifest)


def _train(
    spark: SparkSession,
    settings: Settings,
    job: Job,
    run: TrackedRun,
    name: str,
    stop: Stop,
    early_end: EarlyEnd | None,
) -> TrainResult:
    """Launch it, unless it is pruned already, and pass on its events while it lasts.

    One that came to its end before it could be stopped is pruned all the same: that follows from what it has shown.
    """
    if early_end is None:
        return _launch(spark, settings, job, run, name, stop)
    try:
        result = None if early_end.pruned else _launch(spark, settings, job, run, name, early_end, early_end.see)
    except StoppedError as error:
        if early_end.pruned:
            raise PrunedError(f"{name} was pruned", run.run_id) from None
        raise early_end.error or error from None
    if early_end.error is not None:
        raise early_end.error
    if result is None or early_end.pruned:
        raise PrunedError(f"{name} was pruned", run.run_id)
    return result


def _launch(
    spark: SparkSession,
    settings: Settings,
    job: Job,
    run: TrackedRun,
    name: str,
    stop: Stop,
    watch: Callable[[Sequence[Event]], None] | None = None,
) -> TrainResult:
    from pipeline.training import checkpoint
    from pipeline.training.job import TOKEN, check_host, facts
    from pipeline.training.loop import fit
    from pipeline.training.word import end_launch, looks_for_end

    checkpoints = storage.join(job.folder, "checkpoints")
    # What a driver that was believed dead left at work ends now, and without this token it cannot begin anew.
    storage.publish(storage.join(job.folder, TOKEN), job.token.encode())
    heartbeat.end_attempt(job.folder)
    with (
        TrainingBar(name, settings.train.global_batch) as bar,
        Relay(storage.join(job.folder, "events"), run, bar, watch),
    ):
        results = elastic.run(
            spark,
            fit,
            (job,),
            workers=settings.workers,
            sizes=partial(job.train.allows, norm_statistics=job.model.norm_statistics),
            saved_step=lambda: checkpoint.newest_step(checkpoints),
            facts=facts,
            check=check_host,
            folder=job.folder,
            stop=stop,
            ask_to_end=partial(end_launch, job) if looks_for_end(job) else None,
        )
    return results[0]


def _log_end(
    run: TrackedRun, trial: BegunTrial, trained: TrainResult, manifest: Manifest, which: LogModels
) -> TrialResult:
    """Log the result and, unless MLflow has it or the training diverged, the network."""
    result = _log_result(run, trial.job, trained, manifest.classes)
    if which != "none" and not result.diverged and not trial.record.content.model:
        log_models(run, trial, result, manifest, which)
    return result


def _log_result(run: TrackedRun, job: Job, trained: TrainResult, classes: Sequence[str]) -> TrialResult:
    """Log the final figures, the predictions and, where diagnostics looked, their pictures."""
    from pipeline.report.figures.diagnostics import draw, gradient_norms
    from pipeline.telemetry.events import EventReader

    values = trained.model_dump(mode="json")
    run.log_summary({key: value for key, value in values.items() if not isinstance(value, (list, dict))})
    run.log_summary(recall_metrics(trained.recall, classes))
    if trained.predictions is not None:
        name = trained.predictions.rpartition("/")[2]
        run.log_files(None, {name: storage.read_bytes(trained.predictions)})
    if job.train.diagnostics.every_steps is not None:
        events = EventReader(storage.join(job.folder, "events")).new()
        run.log_files("diagnostics", draw(events))
        values["gradient_norms"] = gradient_norms(events)
    return TrialResult(**values, run_id=run.run_id)


def recall_metrics(recall: Sequence[float | None], classes: Sequence[str]) -> dict[str, float | None]:
    """The recall of each class by its name in MLflow, ``recall/03 dress``; none for more classes than one looks at.

    The number keeps names apart of which MLflow does not allow every letter.
    """
    if len(classes) > MOST_CLASSES:
        return {}
    names = (re.sub(r"[^\w\-. ]", "", name)[:100] for name in classes)
    return {
        f"recall/{number:02d} {name}".rstrip(): share
        for number, (name, share) in enumerate(zip(names, recall, strict=True))
    }
