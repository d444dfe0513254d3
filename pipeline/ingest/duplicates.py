"""Which images are duplicates of others: found by hash and id, so that no image travels for it.

What is found is sent after the images to the shards that they go to anyway (`marks`), and the task that writes a shard
leaves out as many rows of an id as it has marks of it (`leave_out`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from pipeline import storage
from pipeline.data import reasons
from pipeline.data.manifest import QUARANTINE, DatasetError, Manifest
from pipeline.ingest import images
from pipeline.ingest.layout import Layout
from pipeline.ingest.stored import stored_contents

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# Which of two equal images stays: an image that accuracy is measured on must not be trained on.
_KEEP_FIRST = ("test", "validation", "train")


def find_duplicates(spark: SparkSession, rows: DataFrame, layout: Layout, base: Manifest | None) -> DataFrame:
    """The rows whose image another row has pixel for pixel, or the version before has: id, split and origin.

    Of equal images one is not among them: that of the test split before one of validation before one of train, and in
    a split the one with the lowest id. Rows that share an id and a split are the same throughout.

    Parameters
    ----------
    rows : checked images, with their splits; read twice, so that they should be persisted
    base : the version that is added to, if any
    """
    from pyspark.sql import Window
    from pyspark.sql import functions as F

    image = F.col("image")
    if base is not None and layout.expand > 1 and layout.image.encoding != "raw":
        # Images stay raw until their copies are made; those of the earlier version are not.
        image = F.udf(lambda raw: images.from_raw(raw, layout.image), "binary")(image)
    hashed = rows.where(F.col("reason").isNull()).select(
        "id", "split", "origin", F.unhex(F.sha2(image, 256)).alias("content")
    )
    rank = F.array_position(F.array(*[F.lit(name) for name in _KEEP_FIRST]), F.col("split"))
    number = F.row_number().over(Window.partitionBy("content").orderBy(rank, "id"))
    numbered, again = hashed.withColumn("number", number), F.col("number") > 1
    if base is not None:
        known = stored_contents(spark, [storage.join(layout.dataset, shard.path) for shard in base.shards])
        known = known.select(F.unhex("content").alias("content")).distinct().withColumn("known", F.lit(True))
        numbered, again = numbered.join(known, "content", "left"), again | F.col("known").isNotNull()
    return numbered.where(again).select("id", "split", "origin")


def marks(duplicates: DataFrame, layout: Layout) -> DataFrame:
    """What is sent to the shards for each duplicate: a row of the quarantine, and a mark for the image and each copy.

    A mark has the split and the id of what it is about, no image, and ``duplicate`` set.
    """
    from pyspark.sql import functions as F

    def row(split: str, copy: str, duplicate: bool) -> str:
        return f"named_struct('split', {split}, 'copy', {copy}, 'duplicate', {str(duplicate).lower()})"

    copies = f"if(split = 'train', {layout.expand}, 1)"
    each = F.expr(
        f"concat(array({row(repr(QUARANTINE), '0', False)}), "
        f"transform(sequence(0, {copies} - 1), copy -> {row('split', 'copy', True)}))"
    )
    null = F.lit(None)
    return duplicates.select("id", "origin", F.explode(each).alias("row")).select(
        "id",
        F.col("row.split").alias("split"),
        null.cast("int").alias("label"),
        null.cast("binary").alias("image"),
        F.when(~F.col("row.duplicate"), F.col("origin")).alias("origin"),
        F.when(~F.col("row.duplicate"), F.lit(reasons.DUPLICATE)).alias("reason"),
        F.col("row.copy").alias("copy"),
        F.col("row.duplicate").alias("duplicate"),
    )


def leave_out(rows: pa.Table) -> pa.Table:
    """The rows without the duplicates that marks among them name, and without the marks.

    Parameters
    ----------
    rows : of one shard, those of an id one after another. Where ``duplicate`` is set, a row stands for no image but
        says that one of the images with its id is to be left out: any, since they are the same throughout.

    Raises
    ------
    DatasetError
        A mark names no image that is here: the source gave another image when it was read again.
    """
    is_mark = rows.column("duplicate").to_numpy()
    if not is_mark.any():
        return rows
    ids = rows.column("id").to_numpy()
    marked, times = np.unique(ids[is_mark], return_counts=True)
    unmarked, ids = rows.filter(pa.array(~is_mark)), ids[~is_mark]
    # Of each id the first rows are left out: a row's rank among those of its id against the marks of it.
    begins = np.flatnonzero(np.diff(ids, prepend=ids[:1] ^ 1))
    rank = np.arange(len(ids)) - np.repeat(begins, np.diff(begins, append=len(ids)))
    place = np.searchsorted(marked, ids)
    is_marked = marked[np.minimum(place, len(marked) - 1)] == ids
    left_out = np.bincount(place[is_marked], minlength=len(marked))
    if (left_out < times).any():
        raise DatasetError(
            f"the image with the id {marked[left_out < times][0]} was found to be a duplicate, and was another when it "
            "was read again: run this again when nobody changes the source"
        )
    keep = np.ones(len(ids), bool)
    keep[is_marked] = rank[is_marked] >= times[place[is_marked]]
    return unmarked.filter(pa.array(keep))
