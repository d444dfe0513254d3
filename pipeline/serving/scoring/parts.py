"""The Spark plan of `score`: items, part by part, through the tasks; and the images that scores are compared with."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.cluster.progress import spark_tasks
from pipeline.cluster.resources import training_profile
from pipeline.config.dataset import TABLES
from pipeline.config.frozen import FrozenModel
from pipeline.config.score import DATASET
from pipeline.config.settings import Settings, digest_of
from pipeline.data import Manifest
from pipeline.data.profile import Profile, merged
from pipeline.ingest.transform import UNKNOWN_BATCH_ROWS, counts_bytes, partitioned, rows_of_a_batch
from pipeline.serving.scoring.model import PackedModel
from pipeline.serving.scoring.source import PART, ImagesToScore, groups_of, read_row_groups, row_groups_to_read
from pipeline.serving.scoring.task import score_parts
from pipeline.serving.scoring.work import TaskRecord, Work

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# Tasks that look at a split which scores are compared with.
_REFERENCE_TASKS = 4
# Threads that read remote files, each of which takes tens of milliseconds to come.
_REMOTE_THREADS = 8


class Reference(FrozenModel):
    """What a model makes of the images that it was trained and tested with.

    images_of, answers_of : the splits that inputs and predictions are compared with
    images, answers : their profiles
    """

    images_of: str
    answers_of: str
    images: Profile
    answers: Profile


def work_of(settings: Settings, images: ImagesToScore, model: PackedModel, **more: object) -> Work:
    """What tasks must know. ``more`` are folder, prefix and version of the scores."""
    return Work(
        model_file=model.file_name,
        model=str(model.facts),
        classes=model.served.classes,
        form=images.form,
        encoding=images.encoding,
        shape=images.shape,
        item_rows=images.item_rows,
        read=images.read,
        batch_size=settings.score.batch_size,
        threads=_threads(settings, images.source.kind, images.source.path),
        device=settings.workers.device,
        **more,  # type: ignore[arg-type]
    )


def _threads(settings: Settings, kind: str, path: str) -> int:
    is_remote = kind not in (*TABLES, "fashion_mnist") and not storage.is_local(path)
    return settings.score.decode_threads or (_REMOTE_THREADS if is_remote else 1)


def score_images(
    spark: SparkSession, settings: Settings, images: ImagesToScore, work: Work, parts: int, done: Collection[int]
) -> list[TaskRecord]:
    """Score all parts but those that are done, and return what tasks report of each part that has images."""
    from pyspark.sql import functions as F

    items = images.items(parts)
    if done:
        items = items.where(~F.col(PART).isin(list(done)))
    with _few_rows(spark, images), spark_tasks(spark, f"score {settings.name}"):
        return _run(settings, items, images.order, work, parts)


def reference_of(
    spark: SparkSession, settings: Settings, model: PackedModel, manifest: Manifest, dataset: str
) -> Reference:
    """What the model makes of some images of a dataset's splits, kept in ``<output>/cache`` for the next time."""
    most = settings.score.reference_images
    key = digest_of([model.facts.digest, manifest.digest, most]).removeprefix("sha256:")[:16]
    path = storage.join(settings.output, "cache", f"reference-{key}.json")
    if storage.exists(path):
        return Reference.model_validate_json(storage.read_bytes(path))
    answers_of = next((name for name in ("test", "validation") if name in manifest.splits), "train")
    found = {split: _profile_of(spark, settings, model, manifest, dataset, split) for split in {"train", answers_of}}
    reference = Reference(images_of="train", answers_of=answers_of, images=found["train"], answers=found[answers_of])
    storage.publish_json(path, reference)
    return reference


def _profile_of(
    spark: SparkSession, settings: Settings, model: PackedModel, manifest: Manifest, dataset: str, split: str
) -> Profile:
    """The profile of some row groups of a split, spread over it: about as many images as the settings ask for."""
    groups = groups_of(manifest, [split])
    wanted = -(-settings.score.reference_images * len(groups) // max(1, manifest.split(split).rows))
    count = max(1, min(len(groups), wanted))
    some = [groups[number * len(groups) // count] for number in range(count)]
    parts = min(_REFERENCE_TASKS, len(some))
    work = Work(
        folder=None,
        prefix="",
        model_file=model.file_name,
        model=str(model.facts),
        version=0,
        classes=model.served.classes,
        form="stored",
        encoding=manifest.image.encoding,
        shape=manifest.image.shape,
        item_rows=1,
        read=functools.partial(read_row_groups, dataset=dataset),
        batch_size=settings.score.batch_size,
        threads=_threads(settings, DATASET, dataset),
        device=settings.workers.device,
    )
    items = row_groups_to_read(spark, dataset, some, parts)
    looked = min(settings.score.reference_images, manifest.split(split).rows)
    with spark_tasks(spark, f"look at {looked:,} images of {split}"):
        records = _run(settings, items, ("path", "row_group"), work, parts)
    return merged(record.part.profile for record in sorted(records, key=lambda record: record.part.number))


def _run(settings: Settings, items: DataFrame, order: tuple[str, ...], work: Work, parts: int) -> list[TaskRecord]:
    rows = partitioned(items, parts, PART).sortWithinPartitions(PART, *order)
    profile = training_profile(settings.workers)
    options: Any = {} if profile is None else {"profile": profile}  # which Spark before 4.0 does not know
    records = rows.mapInArrow(functools.partial(score_parts, work=work), "record string", **options).collect()
    return [TaskRecord.model_validate_json(row.record) for row in records]


@contextmanager
def _few_rows(spark: SparkSession, images: ImagesToScore) -> Iterator[None]:
    """Where images themselves are handed to Python, of any size, few of them at once."""
    if images.source.kind not in TABLES or counts_bytes(spark):
        yield
        return
    with rows_of_a_batch(spark, UNKNOWN_BATCH_ROWS):
        yield
