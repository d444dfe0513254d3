"""Where images come from: every source becomes work items (a DataFrame) and a function that executors read them with.

An image's ``id`` is its place in a source of numbered images, a hash of its path below a folder, or what a table says:
the same every time the source is read, and the same when images are added beside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pipeline import storage
from pipeline.cluster.connect import is_connect
from pipeline.cluster.errors import spark_failures
from pipeline.ingest.sources.file_names import NO_OTHER_FILES, OtherFiles

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame, SparkSession

# Where rows are counted that should name a split and name none there is; they are set aside.
NO_SPLIT = "?"
_SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation",
                "test": "test"}  # fmt: skip
Form = Literal["pixels", "file", "spark_image"]


NO_DELTA = (
    "Spark has no Delta Lake here. Start it with the jars made for this Spark "
    "(spark.jars.packages=io.delta:delta-spark_2.13:VERSION), "
    "spark.sql.extensions=io.delta.sql.DeltaSparkSessionExtension and "
    "spark.sql.catalog.spark_catalog=org.apache.spark.sql.delta.catalog.DeltaCatalog"
)


def is_without_delta(error: Exception) -> bool:
    """Whether an error of Spark says that it knows no Delta Lake."""
    return any(word in str(error) for word in ("DATA_SOURCE_NOT_FOUND", "ClassNotFound"))


class SourceError(ValueError):
    """A source is missing, cut, or contradicts itself."""


@dataclass(frozen=True)
class Source:
    """What is known of a source before the Spark job reads its images.

    classes : names, in the order of labels; none where the source was opened without labels
    rows : images by the split that the source gives them: "" where ingest splits them by a hash of the id,
        `NO_SPLIT` where they name none
    form : what a payload is: raw pixels of ``pixel_shape`` (C, H, W), the content of an image file, or Spark's struct
    fingerprint : stands for everything that is in it, wherever it lies and whenever it was written
    state : the same with the times of its files, for noticing that one was replaced
    numbered : ids are places in the source, which another source has too
    items : DataFrame with at least a column ``id`` (unless ``numbered``)
    read_tasks : how many tasks the items are to be spread over to be read; None: they lie as they should be read. Items
        with such a number name files and hold no image
    read : on an executor, a record batch of items -> record batches of id (int64), split (string, null where ingest
        splits), label (int32, null where missing, -1 where unknown), payload (binary or struct), origin (string),
        problem (string, a reason to set the row aside, or null)
    persisted : the DataFrame that Spark holds for the job, if any
    other_files : what lies beside the images of a folder
    """

    classes: tuple[str, ...]
    rows: dict[str, int]
    form: Form
    pixel_shape: tuple[int, int, int] | None
    fingerprint: str
    state: str
    numbered: bool
    items: DataFrame
    read: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]]
    read_tasks: int | None = None
    persisted: DataFrame | None = None
    other_files: OtherFiles = NO_OTHER_FILES

    @property
    def own_splits(self) -> bool:
        """Whether the source says which split each image belongs to."""
        return "" not in self.rows

    def spread_items(self) -> DataFrame:
        """The items in as many tasks as they should be read by."""
        return self.items if self.read_tasks is None else self.items.repartition(self.read_tasks, "id")

    def close(self) -> None:
        """Let go of what Spark holds for the job."""
        if self.persisted is not None:
            with contextlib.suppress(*spark_failures()):  # a session that died holds nothing
                self.persisted.unpersist()


def column(name: str) -> Column:
    """A column by its name, whatever characters are in it."""
    from pyspark.sql import functions as F

    return F.col("`" + name.replace("`", "``") + "`")


def class_number(label: Column, classes: tuple[str, ...]) -> Column:
    """The place of a string label among the classes: null for null, and where there are no classes, -1 for one that is
    not there."""
    from pyspark.sql import functions as F

    if not classes:
        return F.lit(None).cast("int")
    known = F.array(*[F.lit(name) for name in classes])
    return (F.array_position(known, label) - 1).cast("int")


def label_name(label: Column) -> Column:
    """A label as a string, null where it is blank."""
    from pyspark.sql import functions as F

    name = label.cast("string")
    return F.when(F.trim(name) != "", name)


def distinct_classes(rows: DataFrame, name: Column) -> tuple[str, ...]:
    """The distinct labels of all rows as classes, in the order of `sorted_classes`.

    Parameters
    ----------
    name : of the label, as `label_name` gives it; null where a row has none
    """
    return sorted_classes({row[0] for row in rows.select(name).distinct().collect() if row[0] is not None})


def sorted_classes(labels: Collection[str]) -> tuple[str, ...]:
    """Labels as classes: by number where all are whole numbers without a sign, else alphabetically."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))


def split_column(name: Column) -> Column:
    """The split that a string names in any of its usual spellings; null for null, and for a string that names none."""
    from pyspark.sql import functions as F

    split = F.lit(None).cast("string")
    for spelling, meant in _SPLIT_NAMES.items():
        split = F.when(F.lower(name) == spelling, F.lit(meant)).otherwise(split)
    return split


def rows_by_split(rows: DataFrame) -> dict[str, int]:
    """How many rows have each value of the column ``split``; `NO_SPLIT` stands for null."""
    return {row["split"] or NO_SPLIT: row["count"] for row in rows.groupBy("split").count().collect()}


def fingerprint(text: str) -> str:
    """The SHA-256 of a text that describes a source, as `Source.fingerprint` and `Source.state` are written."""
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def spark_path(spark: SparkSession, path: str) -> str:
    """A path as Spark's own readers want it.

    ``s3://`` is what fsspec, Databricks and EMR call S3, and ``s3a://`` what Hadoop calls it: where this Spark has no
    filesystem of the first name, it is given the second. A client of Spark Connect cannot ask, and changes nothing.

    Raises
    ------
    SourceError
        Spark has neither.
    """
    if path.startswith("dbfs:"):  # which fsspec reads in another way, and Spark on Databricks alone
        return path
    absolute = storage.absolute(path)
    if absolute.startswith("/"):
        return f"file://{absolute}"
    if not absolute.startswith("s3://") or is_connect(spark) or _has_filesystem(spark, "s3"):
        return absolute
    if not _has_filesystem(spark, "s3a"):
        raise SourceError(
            f"{path}: Spark has no filesystem for S3. Start it with Hadoop's, made for its version of Hadoop "
            "(spark.jars.packages=org.apache.hadoop:hadoop-aws:VERSION)"
        )
    return "s3a" + absolute.removeprefix("s3")


def _has_filesystem(spark: SparkSession, scheme: str) -> bool:
    """Whether the configuration of Spark's Hadoop names a class for addresses of this kind that is there."""
    jvm: Any = spark.sparkContext._jvm
    try:
        jvm.org.apache.hadoop.fs.FileSystem.getFileSystemClass(scheme, spark.sparkContext._jsc.hadoopConfiguration())
    except spark_failures():
        return False
    return True


def exact_path(spark: SparkSession, path: str) -> str:
    """The same for one file or folder whose name may have characters that Spark takes for a pattern."""
    return re.sub(r"([\[\]{}*?\\])", r"\\\1", spark_path(spark, path))


def name_or_pattern(spark: SparkSession, path: str) -> str:
    """As `exact_path` where something local has just this name; elsewhere it may be a pattern, and is for Spark to
    find, whose credentials may be others than ours."""
    is_name = not path.startswith("dbfs:") and storage.is_local(path) and storage.exists(path)
    return exact_path(spark, path) if is_name else spark_path(spark, path)


def to_batch(columns: Mapping[str, Sequence[Any] | pa.Array]) -> pa.RecordBatch:
    """The record batch that `Source.read` yields, from lists or arrays of its columns."""
    import pyarrow as pa

    types = {"id": pa.int64(), "split": pa.string(), "label": pa.int32(), "payload": pa.binary(),
             "origin": pa.string(), "problem": pa.string()}  # fmt: skip
    arrays = [
        columns[name] if isinstance(columns[name], pa.Array) else pa.array(columns[name], kind)
        for name, kind in types.items()
    ]
    return pa.RecordBatch.from_arrays(arrays, names=list(types))
