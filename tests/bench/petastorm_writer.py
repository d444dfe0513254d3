"""Petastorm's way to write a dataset: `materialize_dataset` and row codecs, through our compatibility module.

It writes pickled metadata, which we neither read nor write elsewhere; here it is what the contender does.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq

from pipeline.data import petastorm_compat


class _Written:
    """What `materialize_dataset` asks of pyarrow's former ParquetDataset once the files are written."""

    partitions = metadata = common_metadata = None

    def __init__(self, path: str, filesystem: Any, **_: Any):
        self.fs, self.paths = filesystem, path
        files = petastorm_compat._resolve(path, storage_options=None, filesystem=filesystem, row_groups=None)
        self.pieces = [petastorm_compat._Piece(filesystem, file) for file in files]

    def row_groups(self) -> list[Any]:
        return self.pieces


def schema(height: int = 28, width: int = 28) -> Any:
    petastorm_compat.load()
    from petastorm.codecs import NdarrayCodec, ScalarCodec
    from petastorm.unischema import Unischema, UnischemaField
    from pyspark.sql.types import IntegerType, LongType

    return Unischema(
        "Images",
        [
            UnischemaField("id", np.int64, (), ScalarCodec(LongType()), False),
            UnischemaField("label", np.int32, (), ScalarCodec(IntegerType()), False),
            UnischemaField("image", np.uint8, (height, width), NdarrayCodec(), False),
        ],
    )


def encode(rows: Iterator[Any]) -> Iterator[Any]:
    """On an executor: (id, label, pixels) -> Petastorm's rows."""
    made = schema()
    from petastorm.unischema import dict_to_spark_row

    for row_id, label, image in rows:
        pixels = np.frombuffer(image, np.uint8).reshape(28, 28)
        yield dict_to_spark_row(made, {"id": row_id, "label": label, "image": pixels})


def write(spark: Any, images: Any, folder: str) -> None:
    """A DataFrame of id, label, pixels -> a Petastorm dataset."""
    made = schema()
    from petastorm.etl import dataset_metadata

    dataset_metadata.pq = SimpleNamespace(ParquetDataset=_Written, read_metadata=pq.read_metadata)
    local = dataset_metadata.materialize_dataset(
        spark, f"file://{folder}", made, row_group_size_mb=1, filesystem_factory=lambda: fsspec.filesystem("file")
    )
    with local:
        rows = spark.createDataFrame(images.rdd.map(tuple).mapPartitions(encode), made.as_spark_schema())
        rows.write.mode("overwrite").parquet(f"file://{folder}")
