"""What a dataset holds already, read by executors as they wrote it: through `storage`, with the same credentials.

Spark's own readers would need a Hadoop filesystem and credentials of its own for the same place.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from pipeline import storage

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

_MOST_TASKS = 1000


def stored_ids(spark: SparkSession, paths: Sequence[str]) -> DataFrame:
    """The column ``id`` of Parquet files of a dataset."""
    return _read(spark, paths, ("id",), "id long")


def stored_origins(spark: SparkSession, paths: Sequence[str]) -> DataFrame:
    """The columns ``id`` and ``origin`` of Parquet files that `score` has written."""
    return _read(spark, paths, ("id", "origin"), "id long, origin string")


def stored_labels(spark: SparkSession, paths: Sequence[str]) -> DataFrame:
    """The columns ``id`` and ``label`` of shards of a dataset."""
    return _read(spark, paths, ("id", "label"), "id long, label int")


def stored_contents(spark: SparkSession, paths: Sequence[str]) -> DataFrame:
    """For each row of Parquet files of a dataset the SHA-256 of its ``image``: a column ``content`` of hex digits."""
    return _read(spark, paths, ("image",), "content string")


def _read(spark: SparkSession, paths: Sequence[str], columns: tuple[str, ...], schema: str) -> DataFrame:
    files = spark.createDataFrame([(path,) for path in paths], "path string")
    return files.repartition(min(len(paths), _MOST_TASKS)).mapInArrow(
        functools.partial(_read_files, columns=columns), schema
    )


def _read_files(batches: Iterator[pa.RecordBatch], *, columns: tuple[str, ...]) -> Iterator[pa.RecordBatch]:
    """On an executor: paths -> some columns of the files, row group after row group; of images their hash."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for batch in batches:
        for path in batch.column("path").to_pylist():
            with storage.open_file(path) as source, pq.ParquetFile(source) as file:
                for group in range(file.num_row_groups):
                    for rows in file.read_row_group(group, columns=list(columns), use_threads=False).to_batches():
                        if "image" not in columns:  # Spark wants one schema of all files, metadata and nullability too
                            yield pa.RecordBatch.from_pydict({name: rows.column(name) for name in columns})
                        else:
                            digests = [hashlib.sha256(image).hexdigest() for image in rows.column("image").to_pylist()]
                            yield pa.RecordBatch.from_pydict({"content": pa.array(digests, pa.string())})
