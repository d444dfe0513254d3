"""A folder of image files, known by their names. Listed and read by executors, so that millions are no matter.

An image's id is a hash of its path below the folder. Its label is the folder it lies in, or what a CSV or Parquet file
of labels says.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.cluster.errors import first_line, spark_failures
from pipeline.config.dataset import SourceSettings
from pipeline.data import reasons
from pipeline.ingest.sources.file_names import NO_OTHER_FILES, OtherFiles, image_files, other_files
from pipeline.ingest.sources.listing import list_files
from pipeline.ingest.sources.read_ahead import read_ahead
from pipeline.ingest.sources.source import (
    NO_SPLIT,
    Source,
    SourceError,
    class_number,
    column,
    exact_path,
    fingerprint,
    label_name,
    sorted_classes,
    split_column,
    to_batch,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

# What one task reads, about.
_TASK_BYTES, _TASK_FILES, _FEWEST_TASKS = 64 << 20, 4_000, 8
# What Spark reads in the place of bytes that are not UTF-8, whichever they are: other labels would become one.
_NOT_UTF8 = "\ufffd"
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
    listing, fixed = _list(spark, root)
    files = image_files(_with_labels(spark, listing, settings), settings)
    first_folder = F.substring_index("path", "/", 1)
    split = split_column(first_folder) if settings.split_folders else F.lit(None).cast("string")
    everything = files.withColumn("id", F.xxhash64("path")).withColumn("split", split)
    is_persisted = not fixed or settings.labels is not None
    if is_persisted:  # listed once; counting and reading must see the same files
        everything = everything.persist(StorageLevel.DISK_ONLY)
    items, known = everything.where("is_item"), (settings.classes or known_classes) if labelled else ()
    found = _summary(everything, labels=known is None)
    others = other_files(everything.where("not is_item")) if found.others else NO_OTHER_FILES
    _check(found, root, settings, others)
    classes = sorted_classes(found.labels) if known is None else known
    if labelled and not classes:
        raise SourceError(
            f"source.path {root}: no image has a label; put each class into a folder of its own, or set source.labels"
        )
    numbered = items.withColumn("label", class_number(F.col("label_name"), classes)).select(
        "id", "split", "label", "path", "size", "problem"
    )
    return Source(
        classes=classes,
        rows=_rows(found, settings),
        form="file",
        pixel_shape=None,
        fingerprint=_digest(found.files, found.sum_same, found.xor_same),
        state=_digest(found.files, found.sum_times, found.xor_times),
        numbered=False,
        items=numbered,
        read=functools.partial(_read_files, root=root, split_folders=settings.split_folders),
        read_tasks=_tasks(found.files, found.bytes),
        persisted=everything if is_persisted else None,
        other_files=others,
    )


@dataclass
class _Summary:
    """What is in a folder.

    files, bytes : of the items, and what is to be read of them
    most_of_an_id : items that share an id
    sum_same, xor_same, sum_times, xor_times : stand for all items: with their sizes (same), and with their times
    rows : items by split, `NO_SPLIT` for none
    labels : the distinct labels of the items
    others : files that are no items
    """

    files: int = 0
    bytes: int = 0
    most_of_an_id: int = 0
    sum_same: int = 0
    xor_same: int = 0
    sum_times: int = 0
    xor_times: int = 0
    rows: Counter[str] = field(default_factory=Counter)
    labels: set[str] = field(default_factory=set)
    others: int = 0


def _summary(everything: DataFrame, *, labels: bool) -> _Summary:
    """One query for all that has to be known: each takes a cold Spark a second or more.

    Parameters
    ----------
    labels : whether labels are asked for
    """
    from pyspark.sql import functions as F

    size = F.coalesce("size", F.lit(-1))
    rows = everything.select(
        "id",
        "is_item",
        F.when(F.col("is_item"), F.col("split")).alias("split"),
        F.when(F.col("is_item") & F.lit(labels), F.col("label_name")).alias("label"),
        F.when(F.col("problem").isNull(), F.col("size")).alias("bytes"),
        F.xxhash64("path", size, "label_name").alias("same"),
        F.xxhash64("path", size, "modified").alias("times"),
    )
    # First by id: where none has two items, which is an error, the first values of each are those of its one item.
    columns = ("split", "label", "bytes", "same", "times")
    by_id = rows.groupBy("is_item", "id").agg(F.count("*").alias("files"), *(F.first(c).alias(c) for c in columns))
    groups = by_id.groupBy("is_item", "split", "label").agg(
        F.sum("files").alias("files"), F.max("files").alias("most"), F.sum("bytes").alias("bytes"),
        *(aggregate(F.col(of).cast("decimal(38,0)") if name == "sum" else F.col(of)).alias(f"{name}_{of}")
          for of in ("same", "times") for name, aggregate in (("sum", F.sum), ("xor", F.bit_xor))),
    )  # fmt: skip
    found = _Summary()
    for row in groups.collect():
        if not row.is_item:
            found.others += row.files
            continue
        found.files += row.files
        found.bytes += row.bytes or 0
        found.most_of_an_id = max(found.most_of_an_id, row.most)
        for of in ("same", "times"):
            setattr(found, f"sum_{of}", getattr(found, f"sum_{of}") + int(row[f"sum_{of}"]))
            setattr(found, f"xor_{of}", getattr(found, f"xor_{of}") ^ row[f"xor_{of}"])
        found.rows[row.split or NO_SPLIT] += row.files
        if row.label is not None:
            found.labels.add(row.label)
    return found


def _check(found: _Summary, root: str, settings: SourceSettings, others: OtherFiles) -> None:
    """There are items, each with an id of its own."""
    if not found.files:
        raise SourceError(
            f"{root}: no files that end in {', '.join(settings.extensions)} (dataset.source.extensions); "
            f"others: {others}"
        )
    if found.most_of_an_id > 1:
        raise SourceError(f"{root}: two paths have one hash; rename one of them")


def _tasks(files: int, total_bytes: int) -> int:
    return max(min(files, _FEWEST_TASKS), -(-total_bytes // _TASK_BYTES), -(-files // _TASK_FILES))


def _digest(*values: Any) -> str:
    return fingerprint(repr([str(value) for value in values]))


def _rows(found: _Summary, settings: SourceSettings) -> dict[str, int]:
    if not settings.split_folders:
        return {"": found.files}
    if not found.rows.get("train"):
        raise SourceError(f"{settings.path}: split_folders is set, but there are no images in its folder `train`")
    return dict(found.rows)


def _list(spark: SparkSession, root: str) -> tuple[DataFrame, bool]:
    """All files below the folder, whatever their names, as `list_files` gives them."""
    if not storage.is_folder(root):
        raise SourceError(f"source.path {root}: no such folder")
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
    nameless = F.col("path").isNull() | (F.col("path") == "")
    garbled = F.concat_ws("", "path", "label_name").contains(_NOT_UTF8) & F.lit(_is_csv(settings.labels))
    counts = labels.agg(*(F.count(F.when(wrong, 1)) for wrong in (nameless, garbled))).first()
    assert counts is not None
    if counts[0]:
        raise SourceError(
            f"{settings.labels} has {counts[0]} rows without a {settings.path_column!r}: fill it, or take them out"
        )
    if counts[1]:
        raise SourceError(
            f"{settings.labels} has {counts[1]} rows with a {settings.path_column!r} or {settings.label_column!r} that "
            "is not UTF-8: save it as UTF-8"
        )
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
        if not _is_csv(settings.labels):
            table = spark.read.parquet(where)
        else:
            # A blank after a comma belongs to no name, unless it is quoted.
            table = spark.read.csv(
                where, header=True, escape='"', ignoreLeadingWhiteSpace=True, ignoreTrailingWhiteSpace=True
            )
        missing = [name for name in (settings.path_column, settings.label_column) if name not in table.columns]
    except spark_failures() as error:
        raise SourceError(f"{settings.labels} cannot be read as a table of labels: {first_line(error)}") from None
    if missing and any(_NOT_UTF8 in name for name in table.columns):
        raise SourceError(f"{settings.labels} has names of columns that are not UTF-8: save it as UTF-8")
    if missing:
        raise SourceError(f"{settings.labels} has no column {missing[0]!r}; it has {', '.join(table.columns)}")
    path = F.regexp_replace(column(settings.path_column).cast("string"), r"^(\.?/)+", "")
    return table.select(path.alias("path"), label_name(column(settings.label_column)).alias("label_name"))


def _is_csv(path: str) -> bool:
    return not path.lower().endswith((".parquet", ".pq"))


def _read_files(items: pa.RecordBatch, *, root: str, split_folders: bool) -> Iterator[pa.RecordBatch]:
    """On an executor: paths -> the files' contents.

    A file that is missing or forbidden is a problem of its row. Storage that fails, also after it was tried again, is
    none: it raises, or good images would be set aside for good.
    """
    columns: dict[str, list[Any]] = {}
    size = 0
    for item, payload, unreadable in read_ahead(items.to_pylist(), root):
        problem = reasons.UNREADABLE if unreadable else item["problem"]
        if split_folders and item["split"] is None:
            problem = reasons.MISSING_SPLIT
        row = {**{name: item[name] for name in ("id", "split", "label")},
               "payload": payload, "origin": storage.join(root, item["path"]), "problem": problem}  # fmt: skip
        for name, value in row.items():
            columns.setdefault(name, []).append(value)
        size += len(payload or b"")
        if size > _BATCH_BYTES:
            yield to_batch(columns)
            columns, size = {}, 0
    if columns:
        yield to_batch(columns)
