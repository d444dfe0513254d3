"""The Spark job from a source to a dataset: check, set bad rows aside, split, shuffle, write shards, publish.

One pass and one shuffle. Where a row goes depends on its id and the seed alone, so the same input and settings give
the same files, byte for byte, and the same manifest digest. The manifest lists what tasks that succeeded reported, and
makes the dataset exist. Appending writes more shards and publishes a manifest of both; what was there is not touched.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline import storage
from pipeline.cluster.errors import spark_failures, spark_reason
from pipeline.cluster.progress import spark_tasks
from pipeline.config.dataset import DatasetSettings
from pipeline.config.settings import digest_of
from pipeline.data import manifest, reasons
from pipeline.data.manifest import DatasetError, Ingested, Manifest, Shard, Split
from pipeline.ingest import existing, tasks
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.sources.source import Source, exact_path
from pipeline.ingest.tasks import QUARANTINE, Layout

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# A share of rows is compared as hash % this.
_SHARE_STEPS = 1_000_000
# Bytes of an encoded image for each byte of pixels, about: only the number of shards hangs on it.
_ENCODED_SHARE = {"raw": 1.0, "png": 0.7, "jpeg": 0.25}
# A row group is the unit of reading. Smaller ones cost requests, larger ones memory and shuffling.
_ROW_GROUP_BYTES, _ROW_GROUP_ROWS, _FEWEST_ROW_GROUPS = 4 << 20, (32, 2_048), 64
# Rows of a batch whose images may have any size, where Spark does not count bytes.
_UNKNOWN_BATCH_ROWS = 64
# Which of two equal images stays: an image that is judged by must not be trained on.
_KEEP_FIRST = ("test", "validation", "train")


class IngestError(RuntimeError):
    """The Spark job failed; the message says why."""


def ingest(spark: SparkSession, settings: DatasetSettings, *, cache: str) -> tuple[Manifest, bool]:
    """Make the dataset of the settings, add to it, or find it made already.

    Returns
    -------
    (manifest, written) : ``written`` is False where the same input and settings have already been ingested

    Raises
    ------
    SourceError, FashionMnistError
        The source is missing, cut or altered.
    DatasetError
        Another dataset is at this path, or more than ``max_bad_share`` of the rows had to be set aside.
    IngestError
        The Spark job failed.
    """
    dataset = storage.absolute(settings.path)
    before = existing.published(dataset)
    added_to = before if settings.append else None
    with _plain_errors():
        source = open_source(
            spark,
            settings.source,
            cache,
            first_id=sum(made.rows for made in added_to.sources) if added_to else 0,
            known_classes=added_to.classes if added_to else None,
        )
        try:
            return _ingest(spark, settings, source, dataset, before)
        finally:
            source.close()


def _ingest(
    spark: SparkSession, settings: DatasetSettings, source: Source, dataset: str, before: Manifest | None
) -> tuple[Manifest, bool]:
    settings_digest = existing.settings_digest(settings, source)
    if before is not None:
        if existing.is_there(dataset, before, settings_digest, source):
            return before, False
        existing.check_append(dataset, before, settings, source, _image(settings, source), settings_digest)
        if not settings.append:
            before = None  # it is cut: made again
    existing.remove_leftovers(dataset, before)
    if before is not None and not source.numbered:
        source, already_there = existing.only_new(spark, source, dataset, before)
    else:
        already_there = 0
    coming = Ingested(
        settings_digest=settings_digest,
        state=source.state,
        rows=sum(source.rows.values()),
        already_there=already_there,
    )
    layout = _layout(dataset, settings, source, before)
    try:
        records = _run(spark, source, settings, layout, before)
        added = _added(records, source, settings, layout, coming, spark.conf.get("spark.app.id", None) or "")
        _check_bad_share(added, settings, dataset)
        made = added if before is None else manifest.next_version(before, added)
        if "train" not in made.splits:
            raise DatasetError(
                f"no row of {settings.source.path or settings.source.kind} is left for the split `train`"
            )
        if missing := existing.missing_shard(dataset, made):
            raise DatasetError(
                f"an executor wrote {missing}, but the driver does not see it: "
                "set dataset.path to a place that the driver and all executors share"
            )
        return manifest.publish(dataset, made, before=before), True
    except BaseException:
        existing.clean_up(dataset)
        raise


@contextmanager
def _plain_errors() -> Iterator[None]:
    """An error of Spark as one line; others as they are."""
    try:
        yield
    except spark_failures() as error:
        raise IngestError(f"the Spark job failed: {spark_reason(error)}") from error


def _image(settings: DatasetSettings, source: Source) -> ImageSpec:
    shape = settings.image.shape or source.pixel_shape
    assert shape is not None, "config checks this"
    wanted = settings.image.model_dump(exclude={"shape"})
    return ImageSpec(shape=shape, **wanted)


def _layout(dataset: str, settings: DatasetSettings, source: Source, before: Manifest | None) -> Layout:
    image = _image(settings, source)
    stored = image.raw_bytes * _ENCODED_SHARE[image.encoding]
    expected = _expected_rows(settings, source)
    splits = [(name, max(1, round(rows * stored / settings.shard_bytes))) for name, rows in expected.items() if rows]
    there = before.splits["train"].rows if before else 0
    name = digest_of([existing.settings_digest(settings, source), before.digest if before else None])
    return Layout(
        dataset=dataset,
        prefix="part-" + name.removeprefix("sha256:")[:8],
        splits=(*splits, (QUARANTINE, 1)),
        form=source.form,
        pixel_shape=source.pixel_shape,
        image=image,
        num_classes=len(source.classes),
        row_group_rows=settings.row_group_rows or _row_group_rows(image, there + expected["train"]),
        compression=settings.compression,
        expand=settings.source.expand,
        deform=settings.source.deform,
        seed=settings.seed,
    )


def _row_group_rows(image: ImageSpec, train_rows: float) -> int:
    """Rows for about `_ROW_GROUP_BYTES`, or fewer where a small dataset would have too few groups to shuffle."""
    low, high = _ROW_GROUP_ROWS
    return max(1, min(max(low, min(high, _ROW_GROUP_BYTES // image.raw_bytes)), int(train_rows) // _FEWEST_ROW_GROUPS))


def _expected_rows(settings: DatasetSettings, source: Source) -> dict[str, float]:
    """Rows of each split, about."""
    if source.own_splits:
        rows: dict[str, float] = {name: source.rows.get(name, 0) for name in manifest.SPLITS}
    else:
        whole = source.rows[""]
        rows = {"train": whole * (1 - settings.test_share), "validation": 0, "test": whole * settings.test_share}
    if "validation" not in source.rows:
        share = (
            settings.validation_share if source.own_splits else settings.validation_share / (1 - settings.test_share)
        )
        rows["validation"] = rows["train"] * share
        rows["train"] -= rows["validation"]
    rows["train"] *= settings.source.expand
    return rows


def _run(
    spark: SparkSession, source: Source, settings: DatasetSettings, layout: Layout, before: Manifest | None
) -> list[dict[str, Any]]:
    """Run the job; the records of all files that were written."""
    with _batch_rows(spark, layout), spark_tasks(spark, f"ingest {settings.name}"):
        return [json.loads(row.record) for row in _job(spark, source, settings, layout, before).collect()]


@contextmanager
def _batch_rows(spark: SparkSession, layout: Layout) -> Iterator[None]:
    """Spark counts the rows of what it hands to Python, not (before 4.1) their bytes: large images need few rows."""
    setting = "spark.sql.execution.arrow.maxRecordsPerBatch"
    before = spark.conf.get(setting)
    # A table's images may be far larger than what becomes of them.
    counts_bytes = not (spark.conf.get("spark.sql.execution.arrow.maxBytesPerBatch", None) or "-1").startswith("-")
    rows = layout.batch_rows if layout.form == "pixels" or counts_bytes else min(layout.batch_rows, _UNKNOWN_BATCH_ROWS)
    spark.conf.set(setting, str(rows))
    try:
        yield
    finally:
        with suppress(*spark_failures()):  # of a session that died; why it did is the error to show
            spark.conf.set(setting, str(before))


def _job(
    spark: SparkSession, source: Source, settings: DatasetSettings, layout: Layout, before: Manifest | None
) -> DataFrame:
    from pyspark.sql import functions as F

    check = functools.partial(tasks.check, read=source.read, layout=layout)
    rows = source.items.mapInArrow(
        check, "id long, split string, label int, image binary, origin string, reason string"
    )
    rows = rows.withColumn("split", _split_column(settings, source))
    if settings.deduplicate:
        rows = _without_duplicates(spark, rows, layout, before)
    if layout.expand > 1:
        expand = functools.partial(tasks.expand, layout=layout)
        schema = "id long, split string, label int, image binary, origin string, reason string, copy int"
        copy_id = F.when(F.col("copy") == 0, F.col("id")).otherwise(F.xxhash64("id", "copy"))
        rows = rows.mapInArrow(expand, schema).withColumn("id", copy_id)
    else:
        rows = rows.withColumn("copy", F.lit(0))
    shuffled = rows.withColumn("key", F.xxhash64(F.lit(settings.seed), "id"))
    shard, first = F.lit(0), 0
    for name, count in layout.splits:
        shard = F.when(F.col("split") == name, first + F.pmod(F.col("key"), F.lit(count))).otherwise(shard)
        first += count
    return (
        _by_shard(shuffled.withColumn("shard", shard.cast("int")), first)
        .sortWithinPartitions("shard", "key", "id")
        .select("shard", "id", "label", "image", "origin", "reason", "copy")
        .mapInArrow(functools.partial(tasks.write, layout=layout), "record string")
    )


def _by_shard(rows: DataFrame, shards: int) -> DataFrame:
    """One partition for each shard; where Spark is older than 4.1, chance puts several into one."""
    if hasattr(rows, "repartitionById"):
        return rows.repartitionById(shards, "shard")
    return rows.repartition(shards, "shard")


def _split_column(settings: DatasetSettings, source: Source) -> Column:
    """Where a row goes: set aside, the source's split, or by a hash of its id that no other row changes."""
    from pyspark.sql import functions as F

    place = F.pmod(F.xxhash64(F.lit(settings.seed), F.lit("split"), "id"), F.lit(_SHARE_STEPS))
    validation = int(settings.validation_share * _SHARE_STEPS)
    test = validation + int(settings.test_share * _SHARE_STEPS)
    if not source.own_splits:
        split = F.when(place < validation, "validation").when(place < test, "test").otherwise("train")
    elif "validation" in source.rows:
        split = F.col("split")
    else:
        split = F.when((F.col("split") == "train") & (place < validation), "validation").otherwise(F.col("split"))
    return F.when(F.col("reason").isNotNull(), QUARANTINE).otherwise(split)


def _without_duplicates(spark: SparkSession, rows: DataFrame, layout: Layout, before: Manifest | None) -> DataFrame:
    """Set aside every image that another row has pixel for pixel, keeping test before validation before train."""
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    image = F.col("image")
    if before is not None and layout.expand > 1 and layout.image.encoding != "raw":
        # Images stay raw until their copies are made; those of the earlier version are not.
        image = F.udf(lambda raw: tasks.encode(raw, layout.image), "binary")(image)
    content = F.coalesce(F.sha2(image, 256), F.concat(F.lit("row "), F.col("id").cast("string")))
    rank = F.array_position(F.array(*[F.lit(name) for name in _KEEP_FIRST]), F.col("split"))
    number = F.row_number().over(Window.partitionBy("content").orderBy(rank, "id"))
    marked = rows.withColumn("content", content).withColumn("number", number)
    again = F.col("reason").isNull() & (F.col("number") > 1)
    if before is not None:
        files = [exact_path(storage.join(layout.dataset, s.path)) for p in before.splits.values() for s in p.shards]
        known = spark.read.schema("image binary").parquet(*files).select(F.sha2("image", 256).alias("content"))
        marked = marked.join(known.distinct().withColumn("known", F.lit(True)), "content", "left")
        again = again | (F.col("reason").isNull() & F.col("known").isNotNull())
    return (
        marked.withColumn("again", again)
        .withColumn("reason", F.when(F.col("again"), reasons.DUPLICATE).otherwise(F.col("reason")))
        .withColumn("split", F.when(F.col("again"), QUARANTINE).otherwise(F.col("split")))
        .withColumn("image", F.when(~F.col("again"), F.col("image")))
        .select("id", "split", "label", "image", "origin", "reason")
    )


def _added(
    records: list[dict[str, Any]],
    source: Source,
    settings: DatasetSettings,
    layout: Layout,
    coming: Ingested,
    application: str,
) -> Manifest:
    """The manifest of what this job wrote."""
    reasons: Counter[str] = Counter()
    quarantine = []
    by_split: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["path"]):
        if record["split"] == QUARANTINE:
            reasons.update(record["reasons"])
            quarantine.append(record["path"])
        else:
            by_split.setdefault(record["split"], []).append(record)
    # Copies are counted from the originals, not from what was written: a lost one breaks the sum.
    copies = (layout.expand - 1) * sum(record["originals"] for record in by_split.get("train", ()))
    return manifest.seal(
        Manifest(
            name=settings.name,
            settings_digest=coming.settings_digest,
            spark_application=application,
            image=manifest.Image(encoding=layout.image.encoding, shape=layout.image.shape),
            classes=source.classes,
            input_rows=coming.rows + copies,
            set_aside=dict(sorted(reasons.items())),
            quarantine=tuple(quarantine),
            sources=(coming,),
            splits={name: _split(by_split[name], layout) for name in manifest.SPLITS if name in by_split},
        )
    )


def _split(records: list[dict[str, Any]], layout: Layout) -> Split:
    fields = Shard.model_fields
    return manifest.with_statistics(
        np.sum([record["label_counts"] for record in records], axis=0).tolist(),
        np.sum([record["sums"] for record in records], axis=0).tolist(),
        tuple(Shard(**{name: record[name] for name in fields}) for record in records),
        layout.image.shape,
    )


def _check_bad_share(made: Manifest, settings: DatasetSettings, dataset: str) -> None:
    bad = Counter(made.set_aside)
    bad.pop(reasons.DUPLICATE, None)  # asked for, and nothing is wrong with them
    rows = sum(source.rows for source in made.sources)
    if bad.total() > settings.max_bad_share * rows:
        most = ", ".join(f"{reason} {count}" for reason, count in bad.most_common(3))
        raise DatasetError(
            f"{bad.total()} of {rows} rows cannot be used ({most}), more than dataset.max_bad_share "
            f"{settings.max_bad_share}: see {storage.join(dataset, QUARANTINE)} for each, mend the source or raise it"
        )
