"""The Spark plan of ingest: check every image, split, set duplicates aside, make copies, shuffle, write.

Images are shuffled once, to the shard that they are written to; or only names of files are, and the task that writes a
shard reads them. Where a row goes depends on its id and the seed alone, so the same input and settings give the same
files, either way.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from pipeline.cluster.connect import is_connect
from pipeline.cluster.errors import spark_failures
from pipeline.cluster.progress import spark_tasks
from pipeline.config.dataset import DatasetSettings
from pipeline.data.manifest import QUARANTINE, Manifest
from pipeline.ingest import from_paths, tasks
from pipeline.ingest.duplicates import find_duplicates, marks
from pipeline.ingest.layout import Layout
from pipeline.ingest.sources.source import Source, SourceError
from pipeline.ingest.tasks import WrittenQuarantine, WrittenShard

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame, SparkSession

# A share of rows is compared as hash % this.
_SHARE_STEPS = 1_000_000
# Rows of a batch whose images may have any size, where Spark does not count bytes.
UNKNOWN_BATCH_ROWS = 64
# Shards for each core, and for each task that would else read files, from which on a task for each shard does as well.
_SHARDS_OF_A_CORE, _SHARDS_OF_A_TASK = 3, 0.5
_CHECKED = "id long, split string, label int, image binary, origin string, reason string"


def write_files(
    spark: SparkSession, source: Source, settings: DatasetSettings, layout: Layout, base: Manifest | None
) -> list[WrittenShard | WrittenQuarantine]:
    """Run the job, and return what its tasks report of every file they published.

    Parameters
    ----------
    base : the version that is added to, if any; images that it has are duplicates
    """
    with spark_tasks(spark, f"ingest {settings.name}"), ExitStack() as stack:
        if _shuffles_paths(spark, source, settings, layout):
            return [tasks.read_record(row.record) for row in _plan_of_paths(source, settings, layout).collect()]
        stack.enter_context(_batch_rows(spark, layout))
        rows, duplicates = _checked(source, settings, layout), None
        if settings.deduplicate:
            # Read twice, for hashes and for shards: on the executors' disks, since decoding takes longer than reading.
            rows = stack.enter_context(_persisted(rows))
            duplicates = stack.enter_context(_persisted(find_duplicates(spark, rows, layout, base)))
        records = _plan(rows, duplicates, settings, layout).collect()
        return [tasks.read_record(row.record) for row in records]


def _shuffles_paths(spark: SparkSession, source: Source, settings: DatasetSettings, layout: Layout) -> bool:
    """Whether names of files are shuffled and not their images.

    Files are then made into images by as many tasks as there are shards: too few of them leave cores idle, which a
    client of Spark Connect cannot count. Where an image goes to several shards, or its content decides, images are.
    """
    if source.read_tasks is None or settings.source.expand > 1 or settings.deduplicate or is_connect(spark):
        return False
    shards = sum(count for split, count in layout.splits if split != QUARANTINE)
    cores = spark.sparkContext.defaultParallelism
    return shards >= max(_SHARDS_OF_A_CORE * cores, _SHARDS_OF_A_TASK * source.read_tasks)


def _plan_of_paths(source: Source, settings: DatasetSettings, layout: Layout) -> DataFrame:
    """Names of files -> one record of each file that is written."""
    from pyspark.sql import functions as F

    key = F.xxhash64(F.lit(settings.seed), "id")
    files = source.items.withColumn("split", _split_of(settings, source)).withColumn("key", key)
    shard, shards = _shard_column(layout)
    written = (
        partitioned(files.withColumn("shard", shard), shards, "shard")
        .sortWithinPartitions("shard", "key", "id")
        .mapInArrow(functools.partial(from_paths.write, read=source.read, layout=layout), from_paths.WRITTEN)
    )
    in_order = written.repartition(1).withColumn("key", key).sortWithinPartitions("key", "id").drop("key")
    return in_order.mapInArrow(functools.partial(from_paths.write_quarantine, layout=layout), "record string")


@contextmanager
def _persisted(rows: DataFrame) -> Iterator[DataFrame]:
    from pyspark import StorageLevel

    try:
        yield rows.persist(StorageLevel.DISK_ONLY)
    finally:
        with suppress(*spark_failures()):  # a session that died holds nothing
            rows.unpersist()


@contextmanager
def _batch_rows(spark: SparkSession, layout: Layout) -> Iterator[None]:
    """Few rows in a batch where images are large; a table's images may be far larger than what becomes of them."""
    by_bytes = layout.form == "pixels" or counts_bytes(spark)
    with rows_of_a_batch(spark, layout.batch_rows if by_bytes else min(layout.batch_rows, UNKNOWN_BATCH_ROWS)):
        yield


def counts_bytes(spark: SparkSession) -> bool:
    """Whether Spark counts the bytes of what it hands to Python (since 4.1), not only the rows."""
    return not (spark.conf.get("spark.sql.execution.arrow.maxBytesPerBatch", None) or "-1").startswith("-")


@contextmanager
def rows_of_a_batch(spark: SparkSession, rows: int) -> Iterator[None]:
    """Let Spark hand at most so many rows to Python at once while the block runs."""
    setting = "spark.sql.execution.arrow.maxRecordsPerBatch"
    rows_before = spark.conf.get(setting)
    spark.conf.set(setting, str(rows))
    try:
        yield
    finally:
        with suppress(*spark_failures()):  # of a session that died; why it did is the error to show
            spark.conf.set(setting, str(rows_before))


def _checked(source: Source, settings: DatasetSettings, layout: Layout) -> DataFrame:
    """The images of the source, each with its split, or with the reason to set it aside."""
    from pyspark.sql import functions as F

    check = functools.partial(tasks.check, read=source.read, layout=layout)
    split = F.when(F.col("reason").isNotNull(), QUARANTINE).otherwise(_split_of(settings, source))
    return source.spread_items().mapInArrow(check, _CHECKED).withColumn("split", split)


def _plan(rows: DataFrame, duplicates: DataFrame | None, settings: DatasetSettings, layout: Layout) -> DataFrame:
    """Checked images -> one record of each file that is written."""
    from pyspark.sql import functions as F

    rows = _expanded(rows, layout).withColumn("duplicate", F.lit(False))
    if duplicates is not None:
        rows = rows.unionByName(marks(duplicates, layout))
    if layout.expand > 1:  # each copy has an id of its own
        rows = rows.withColumn("id", F.when(F.col("copy") == 0, F.col("id")).otherwise(F.xxhash64("id", "copy")))
    rows = rows.withColumn("key", F.xxhash64(F.lit(settings.seed), "id"))
    shard, shards = _shard_column(layout)
    return (
        partitioned(rows.withColumn("shard", shard), shards, "shard")
        .sortWithinPartitions("shard", "key", "id")
        .select("shard", "id", "label", "image", "origin", "reason", "copy", "duplicate")
        .mapInArrow(functools.partial(tasks.write, layout=layout), "record string")
    )


def _split_of(settings: DatasetSettings, source: Source) -> Column:
    """The split of a row that can be used: the source's, or one by a hash of its id that no other row changes."""
    from pyspark.sql import functions as F

    share = F.pmod(F.xxhash64(F.lit(settings.seed), F.lit("split"), "id"), F.lit(_SHARE_STEPS))
    validation = int(settings.validation_share * _SHARE_STEPS)
    test = validation + int(settings.test_share * _SHARE_STEPS)
    if not source.own_splits:
        return F.when(share < validation, "validation").when(share < test, "test").otherwise("train")
    if "validation" in source.rows:
        return F.col("split")
    return F.when((F.col("split") == "train") & (share < validation), "validation").otherwise(F.col("split"))


def check_shares(settings: DatasetSettings, source: Source) -> None:
    """Check that ``test_share`` says something of the source, where it is another than the default.

    Raises
    ------
    SourceError
        The source has splits of its own, and no ``test``: training rows are never set apart for it, or images that a
        dataset has in ``train`` already would be in ``test`` when it is made anew.
    """
    default = DatasetSettings.model_fields["test_share"].default
    if source.own_splits and "test" not in source.rows and settings.test_share not in (0, default):
        raise SourceError(
            f"dataset.test_share {settings.test_share} cannot be set apart: the source has splits of its own, and none "
            "is `test`. Put images of that split into the source, or leave dataset.test_share out"
        )


def _expanded(rows: DataFrame, layout: Layout) -> DataFrame:
    """The rows as copy 0, and the deformed copies of training images."""
    from pyspark.sql import functions as F

    if layout.expand == 1:
        return rows.withColumn("copy", F.lit(0))
    return rows.mapInArrow(functools.partial(tasks.expand, layout=layout), f"{_CHECKED}, copy int")


def _shard_column(layout: Layout) -> tuple[Column, int]:
    """The number of the shard that a row goes to, by its split and key, and how many shards there are."""
    from pyspark.sql import functions as F

    shard, first = F.lit(0), 0
    for name, count in layout.splits:
        shard = F.when(F.col("split") == name, first + F.pmod(F.col("key"), F.lit(count))).otherwise(shard)
        first += count
    return shard.cast("int"), first


def partitioned(rows: DataFrame, count: int, column: str) -> DataFrame:
    """One partition for each number from 0 in a column; where Spark is older than 4.1, chance puts several into one."""
    if hasattr(rows, "repartitionById"):
        return rows.repartitionById(count, column)
    return rows.repartition(count, column)
