"""`score`: images and a model to probabilities, as one Spark job, published once and whole.

Tasks publish parts; what lists them is published last. A job that died is gone on with by the same command: parts that
are there are counted, and only the others are scored.
"""

from __future__ import annotations

import logging
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.cluster import resources
from pipeline.cluster.errors import spark_failures, spark_reason
from pipeline.cluster.sent_files import send
from pipeline.config.score import DATASET
from pipeline.config.settings import Settings, digest_of
from pipeline.data import Manifest, versions
from pipeline.data.profile import Profile, merged
from pipeline.ingest.claim import Claim, claimed
from pipeline.serving.scoring import drift as drifting
from pipeline.serving.scoring import scores as on_disk
from pipeline.serving.scoring import source as sources
from pipeline.serving.scoring.errors import ScoreError, ScoreJobError
from pipeline.serving.scoring.model import PackedModel, check_dataset, check_shape, find_model
from pipeline.serving.scoring.parts import score_images, work_of
from pipeline.serving.scoring.result import ScoreResult
from pipeline.serving.scoring.scores import PartRecord, Plan, Scores
from pipeline.serving.scoring.source import ImagesToScore
from pipeline.serving.scoring.table import ScoreTable
from pipeline.serving.scoring.work import TaskRecord
from pipeline.storage.writable import prepare_output

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.tracking import Tracker
    from pipeline.tracking.run import TrackedRun

log = logging.getLogger(__name__)

RESULT = "score.json"


@dataclass(frozen=True)
class _Job:
    """What is known before anything is launched.

    folder : of the scores, an absolute path or a URL
    found : the newest version that is there
    base : the same, if it is added to
    table : that gets the scores too, if any
    manifest : of ``dataset.path``, if there is a dataset
    """

    spark: SparkSession
    settings: Settings
    folder: str
    model: PackedModel
    found: Scores | None
    table: ScoreTable | None
    manifest: Manifest | None

    @property
    def base(self) -> Scores | None:
        return self.found if self.settings.score.append else None

    @property
    def application(self) -> str:
        return self.spark.conf.get("spark.app.id", None) or ""


def score(spark: SparkSession, settings: Settings) -> ScoreResult:
    """Score the images of ``score.source`` with ``score.model``, and leave the result in ``<output>/score.json``.

    Scores and what was set aside are in ``score.output``; see `pipeline.serving.scoring.scores`. The result of an
    earlier call is removed first, so that a failure cannot look like it.

    Raises
    ------
    ScoreError, ServedModelError, RegistryError
        The model is unknown, has other classes or another image shape than the dataset, the output has other scores, or
        more than ``score.max_bad_share`` of the images had to be set aside.
    SourceError, DatasetError
        The source is missing, cut or altered, or another job is writing to the output.
    TrackingError
        The tracking store or the registry is down for ``tracking.outage_seconds``.
    ScoreJobError
        The Spark job failed. What was scored is kept, and the same call goes on.
    """
    from pipeline.tracking import Tracker

    prepare_output(settings.output, RESULT)
    tracker = Tracker(settings.tracking)
    with _spark_errors_as_one_line():
        job = _prepared(spark, settings)
        with sources.opened(spark, settings, job.model.served.classes, folder=job.folder, base=job.base) as images:
            result = _known(job, images)
            if result is not None:
                _end_run(job, tracker)
            else:
                with claimed(job.folder, job.application, setting="score.output") as claim:
                    if on_disk.newest(job.folder) != job.found:
                        raise ScoreError(f"another job has published scores in {job.folder} meanwhile: run this again")
                    plan = _plan(job, images)
                    storage.publish_json(storage.join(job.folder, on_disk.PLAN), plan)
                    facts = job.model.facts
                    with tracker.run(
                        f"score {settings.name}", settings=settings, mark=plan.run_mark, run_id=plan.mlflow_run,
                        kind="score", model=str(facts), model_digest=facts.digest,
                    ) as run:  # fmt: skip
                        result = _scored(job, images, plan, claim, run)
                    storage.remove_file(storage.join(job.folder, on_disk.PLAN))
    storage.publish_json(storage.join(settings.output, RESULT), result)
    return result


def scores_folder(settings: Settings) -> str:
    """The folder that `score` writes into: an absolute path or a URL."""
    return storage.absolute(settings.score.output or storage.join(settings.output, "scores"))


def _prepared(spark: SparkSession, settings: Settings) -> _Job:
    """Everything that can be checked before the source is looked at."""
    model, folder = find_model(settings), scores_folder(settings)
    resources.slots(spark, settings.workers)  # raises where workers.task_cpus or task_gpus cannot be had
    found = on_disk.newest(folder)
    if found is not None and found.classes != model.served.classes:
        raise ScoreError(
            f"{folder} has scores of the classes {', '.join(found.classes)}, and {model.facts.uri} has "
            f"{', '.join(model.served.classes)}: choose another score.output"
        )
    if gone := on_disk.missing_part(folder, found):
        raise ScoreError(f"{storage.join(folder, gone)} is missing: restore it, or delete {folder} to score again")
    if settings.score.source.kind == DATASET:
        path = sources.dataset_of(settings)
        check_dataset(model, versions.load_manifest(path), path)
    manifest = versions.newest(storage.absolute(settings.dataset.path))
    if manifest is not None and settings.score.reference_images:
        check_dataset(model, manifest, settings.dataset.path)
    table = ScoreTable(spark, settings.score.table, settings.score.table_format) if settings.score.table else None
    if table is not None:
        table.check(folder)
    return _Job(spark, settings, folder, model, found, table, manifest)


def _end_run(job: _Job, tracker: Tracker) -> None:
    """Mark the run of a job as finished that died between the scores and the run's end."""
    plan = on_disk.read_plan(job.folder)
    if plan is None or job.found is None or plan.digest not in job.found.plans:
        return
    with claimed(job.folder, job.application, setting="score.output"):
        with tracker.run(
            f"score {job.settings.name}", settings=job.settings, mark=plan.run_mark, run_id=plan.mlflow_run
        ):
            pass
        storage.remove_file(storage.join(job.folder, on_disk.PLAN))


def _digest(job: _Job, images: ImagesToScore) -> str:
    """What decides the scores: the images, the model, and the version that is added to."""
    source = images.source
    return digest_of(
        {
            "source": [source.kind, source.fingerprint, source.state, source.shards],
            "model": job.model.facts.digest,
            "base": job.base.digest if job.base else None,
            "format": on_disk.FORMAT,
        }
    )


def _known(job: _Job, images: ImagesToScore) -> ScoreResult | None:
    """The result where these images have been scored already; None where there is something to score.

    Raises
    ------
    ScoreError
        The output has other scores, or parts of them are missing.
    """
    if images.form == "pixels" and images.shape is not None:
        check_shape(job.model, images.shape, images.source.path)
    found, digest = job.found, _digest(job, images)
    if found is None:
        return None
    is_same = digest in found.plans
    if not (is_same or job.settings.score.append):
        raise ScoreError(
            f"{job.folder} has scores of other images or of another model ("
            f"{', '.join(sorted({*map(str, found.models)}))}): choose another score.output, delete that folder, or set "
            "score.append to score what is new"
        )
    if not is_same and images.rows:
        return None
    on_disk.mend_copy(job.folder, found)
    return _result(job, found, (), images, run_id="", written=False)


def _plan(job: _Job, images: ImagesToScore) -> Plan:
    """The plan of a job that died, where it was about the same; else a new one, and what others left is deleted."""
    digest, earlier = _digest(job, images), on_disk.read_plan(job.folder)
    if earlier is not None and earlier.digest == digest:
        return earlier
    if left := on_disk.unlisted(job.folder, job.found):
        log.warning("%d parts of a job that did not end, of other images or another model, are deleted", len(left))
        for path in left:
            storage.remove_file(storage.join(job.folder, path))
    parts = sources.parts_of(images.rows, job.settings.score.part_rows)
    return Plan(digest=digest, parts=parts, run_mark=uuid.uuid4().hex)


def _scored(job: _Job, images: ImagesToScore, plan: Plan, claim: Claim, run: TrackedRun) -> ScoreResult:
    """Score what is missing, and publish the version that has all of it."""
    plan = plan.model_copy(update={"mlflow_run": run.run_id})
    storage.publish_json(storage.join(job.folder, on_disk.PLAN), plan)
    version = job.base.version + 1 if job.base else 1
    work = work_of(job.settings, images, job.model, folder=job.folder, prefix=plan.prefix, version=version)
    send(job.spark, job.model.file_name, job.model.archive)
    before, started = on_disk.done_parts(job.folder, plan), time.monotonic()
    told = score_images(job.spark, job.settings, images, work, plan.parts, [record.number for record in before])
    seconds = time.monotonic() - started
    records = [*before, *(record.part for record in told)]
    on_disk.check_seen(job.folder, records)
    whole = on_disk.of_version(
        job.base, records, plan=plan, model=job.model.facts, source=images.source,
        classes=job.model.served.classes, application=job.application,
    )  # fmt: skip
    _check_bad_share(job, records)
    if job.table is not None:
        job.table.write(job.folder, whole, [record.path for record in records])
    profile = merged(record.profile for record in records) if records else None
    result = _result(job, whole, records, images, run_id=run.run_id, told=told, profile=profile, seconds=seconds)
    drifting.leave(run, job.folder, result, profile, name=job.settings.name)
    claim.check()
    on_disk.publish(job.folder, whole)
    return result


def _result(
    job: _Job,
    whole: Scores,
    records: Sequence[PartRecord],
    images: ImagesToScore,
    *,
    run_id: str,
    told: Sequence[TaskRecord] = (),
    profile: Profile | None = None,
    seconds: float = 0.0,
    written: bool = True,
) -> ScoreResult:
    drift, notes, table = None, ["nothing new was scored"], job.settings.score.table
    if not written and job.table is not None and not job.table.is_there():
        notes.append(f"score.table {table} was not made: it gets versions that are scored while it is set")
        table = None
    if profile is not None and written:
        drift, notes = drifting.compared(job.spark, job.settings, job.model, job.manifest, profile)
    set_aside: Counter[str] = Counter()
    for record in records:
        set_aside.update(record.set_aside)
    return ScoreResult(
        scores=job.folder,
        table=table,
        written=written,
        version=whole.version,
        model=job.model.facts,
        classes=whole.classes,
        images=sum(record.rows for record in records),
        already_there=images.source.already_there if written else images.source.rows,
        set_aside=dict(sorted(set_aside.items())),
        class_counts=profile.classes if profile else (0,) * len(whole.classes),
        parts=len(records),
        parts_found=len(records) - len(told),
        seconds=round(seconds, 3),
        processes=len({record.process for record in told}),
        model_loads=sum(record.loaded_model for record in told),
        mlflow_run=run_id,
        drift=drift,
        notes=tuple(notes),
    )


def _check_bad_share(job: _Job, records: Sequence[PartRecord]) -> None:
    bad: Counter[str] = Counter()
    for record in records:
        bad.update(record.set_aside)
    rows = bad.total() + sum(record.rows for record in records)
    if bad.total() > job.settings.score.max_bad_share * rows:
        most = ", ".join(f"{reason} {count}" for reason, count in bad.most_common(3))
        raise ScoreError(
            f"{bad.total()} of {rows} images cannot be used ({most}), more than score.max_bad_share "
            f"{job.settings.score.max_bad_share}: see {storage.join(job.folder, on_disk.QUARANTINE)} for each, "
            "mend the source, or raise it; what was scored is kept"
        )


@contextmanager
def _spark_errors_as_one_line() -> Iterator[None]:
    try:
        yield
    except spark_failures() as error:
        raise ScoreJobError(f"the Spark job failed: {spark_reason(error)}") from error
