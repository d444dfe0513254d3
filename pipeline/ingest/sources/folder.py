"""A folder of image files, known by their names. Listed and read by executors, so that millions are no matter.

An image's id is a hash of its path below the folder. Its label is the folder it lies in, or what a CSV or Parquet file
of labels says.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.cluster.errors import first_line, spark_failures
from pipeline.config.dataset import SourceSettings
from pipeline.data import reasons
from pipeline.ingest.sources.file_names import OtherFiles, image_files, other_files
from pipeline.ingest.sources.listing import list_files
from pipeline.ingest.sources.source import (
    Source,
    SourceError,
    class_number,
    distinct_classes,
    exact_path,
    fingerprint,
    label_name,
    rows_by_split,
    split_column,
    to_batch,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, Row, SparkSession

# What one task reads, about.
_TASK_BYTES, _TASK_FILES, _FEWEST_TASKS = 64 << 20, 4_000, 8
# Bytes of files that one record batch holds, about.
_BATCH_BYTES = 16 << 20


def open_folder(
    spark: SparkSession, settings: SourceSettings, *, known_classes: tuple[str, ...] | None, labelled: bool = True
) -> Source:
    """List the folder and give every file its label, or none.

    Raises
    ------
    SourceError
        There is no such folder, it has no images, or the file of labels is unusable.
    """
    from pyspark import StorageLevel
    from pyspark.sql import functions as F

    root = storage.absolute(settings.path or "").rstrip("/")
    listing = _list(spark, root)
    files = image_files(_with_labels(spark, listing, settings), settings)
    first_folder = F.substring_index("path", "/", 1)
    split = split_column(first_folder) if settings.split_folders else F.lit(None).cast("string")
    everything = (
        files.withColumn("id", F.xxhash64("path"))
        .withColumn("split", split)
        .persist(StorageLevel.DISK_ONLY)  # listed once; counting and reading must see the same files
    )
    items, others = everything.where("is_item"), other_files(everything.where("not is_item"))
    totals = _totals(items, root, settings, others)
    classes: tuple[str, ...] = ()
    if labelled:
        classes = settings.classes or known_classes or distinct_classes(items, F.col("label_name"))
        if not classes:
            raise SourceError(f"{root}: no image has a label; put each class into a folder of its own, or set `labels`")
    numbered = items.withColumn("label", class_number(F.col("label_name"), classes)).select(
        "id", "split", "label", "path", "problem"
    )
    return Source(
        classes=classes,
        rows=_rows(items, settings, totals.files),
        form="file",
        pixel_shape=None,
        fingerprint=_digest(totals.files, totals.sum_same, totals.xor_same),
        state=_digest(totals.files, totals.sum_times, totals.xor_times),
        numbered=False,
        items=numbered.repartition(_tasks(totals.files, totals.bytes or 0), "id"),
        read=functools.partial(_read_files, root=root, split_folders=settings.split_folders),
        persisted=everything,
        other_files=others,
    )


def _totals(items: DataFrame, root: str, settings: SourceSettings, others: OtherFiles) -> Row:
    """Files, bytes to read of them, and what stands for all of them: with their sizes (same), and with their times."""
    from pyspark.sql import functions as F

    size = F.coalesce("size", F.lit(-1))
    same, times = F.xxhash64("path", size, "label_name"), F.xxhash64("path", size, "modified")
    totals = items.agg(
        F.count("*").alias("files"),
        F.sum(F.when(F.col("problem").isNull(), F.col("size"))).alias("bytes"),
        F.countDistinct("id").alias("ids"),
        *(aggregate(value.cast("decimal(38,0)") if name == "sum" else value).alias(f"{name}_{of}")
          for of, value in (("same", same), ("times", times))
          for name, aggregate in (("sum", F.sum), ("xor", F.bit_xor))),
    ).first()  # fmt: skip
    assert totals is not None
    if not totals.files:
        raise SourceError(
            f"{root}: no files that end in {', '.join(settings.extensions)} (dataset.source.extensions); "
            f"others: {others}"
        )
    if totals.ids != totals.files:
        raise SourceError(f"{root}: two paths have one hash; rename one of them")
    return totals


def _tasks(files: int, total_bytes: int) -> int:
    return max(min(files, _FEWEST_TASKS), -(-total_bytes // _TASK_BYTES), -(-files // _TASK_FILES))


def _digest(*values: Any) -> str:
    return fingerprint(repr([str(value) for value in values]))


def _rows(items: DataFrame, settings: SourceSettings, files: int) -> dict[str, int]:
    if not settings.split_folders:
        return {"": files}
    counts = rows_by_split(items)
    if not counts.get("train"):
        raise SourceError(f"{settings.path}: split_folders is set, but there are no images in its folder `train`")
    return counts


def _list(spark: SparkSession, root: str) -> DataFrame:
    """All files below the folder, whatever their names."""
    if not storage.is_folder(root):
        raise SourceError(f"{root}: no such folder")
    return list_files(spark, root)


def _with_labels(spark: SparkSession, listing: DataFrame, settings: SourceSettings) -> DataFrame:
    """The listing with a column ``label_name``, and ``listed``, whether a file of labels has it.

    A label whose file is missing is a row of its own.
    """
    from pyspark.sql import functions as F

    if settings.labels is None:
        parts, depth = F.split("path", "/"), 1 if settings.split_folders else 0
        name = F.when(F.size(parts) > depth + 1, parts[depth])
        return listing.withColumn("label_name", name).withColumn("listed", F.lit(False))
    labels = _read_labels(spark, settings)
    nameless = labels.where(F.col("path").isNull() | (F.col("path") == "")).count()
    if nameless:
        raise SourceError(f"{settings.labels} has {nameless} rows without a {settings.path_column!r}")
    twice = labels.groupBy("path").count().where("count > 1").first()
    if twice is not None:
        raise SourceError(f"{settings.labels} has {twice['count']} rows for {twice['path']}: one is right")
    # What is persisted keeps the partitions of the join: 200 of them, unless set, for a table of any size.
    labels = labels.withColumn("listed", F.lit(True))
    return listing.join(labels, "path", "full_outer").coalesce(_parallelism(spark))


def _parallelism(spark: SparkSession) -> int:
    """Tasks that Spark cuts work into by default. Only a query can tell over Spark Connect too."""
    from pyspark.sql import functions as F

    return spark.range(1 << 16).select(F.spark_partition_id()).distinct().count()


def _read_labels(spark: SparkSession, settings: SourceSettings) -> DataFrame:
    from pyspark.sql import functions as F

    assert settings.labels is not None
    where = exact_path(spark, settings.labels)
    try:
        if settings.labels.lower().endswith((".parquet", ".pq")):
            table = spark.read.parquet(where)
        else:
            # A blank after a comma belongs to no name, unless it is quoted.
            table = spark.read.csv(
                where, header=True, escape='"', ignoreLeadingWhiteSpace=True, ignoreTrailingWhiteSpace=True
            )
        missing = [name for name in (settings.path_column, settings.label_column) if name not in table.columns]
    except spark_failures() as error:
        raise SourceError(f"{settings.labels} cannot be read as a table of labels: {first_line(error)}") from None
    if missing:
        raise SourceError(f"{settings.labels} has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    path = F.regexp_replace(F.col(f"`{settings.path_column}`").cast("string"), r"^(\.?/)+", "")
    return table.select(path.alias("path"), label_name(F.col(f"`{settings.label_column}`")).alias("label_name"))


def _read_files(items: pa.RecordBatch, *, root: str, split_folders: bool) -> Iterator[pa.RecordBatch]:
    """On an executor: paths -> the files' contents.

    A file that is missing or forbidden is a problem of its row. Storage that fails, also after it was tried again, is
    none: it raises, or good images would be set aside for good.
    """
    columns: dict[str, list[Any]] = {}
    size = 0
    for item in items.to_pylist():
        origin = storage.join(root, item["path"])
        payload: bytes | None = None
        problem: str | None = item["problem"]
        if problem is None:
            try:
                payload, problem = storage.read_bytes(origin), None
            except OSError as error:
                if isinstance(error, storage.UnreachableError):
                    raise
                problem = reasons.UNREADABLE
        if split_folders and item["split"] is None:
            problem = reasons.MISSING_SPLIT
        row = {**{name: item[name] for name in ("id", "split", "label")},
               "payload": payload, "origin": origin, "problem": problem}  # fmt: skip
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        size += len(payload or b"")
        if size > _BATCH_BYTES:
            yield to_batch(columns)
            columns, size = {}, 0
    if columns:
        yield to_batch(columns)
