"""What is to be scored: the source of `ingest` that the settings name, or the shards of a dataset, in numbered parts.

A part is what one task scores and one file of scores holds. Which part an image belongs to hangs on its id (or on its
place among numbered records and shards) and the number of parts alone, so that a job that is run again, on any cluster,
cuts the same parts.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pipeline import storage
from pipeline.config.dataset import TABLES
from pipeline.config.score import DATASET
from pipeline.config.settings import Settings, digest_of
from pipeline.data import Manifest, load_manifest
from pipeline.data.manifest import SPLITS
from pipeline.ingest.existing import without_stored
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.sources.source import Source, SourceError
from pipeline.ingest.stored import stored_origins
from pipeline.serving.scoring.errors import ScoreError
from pipeline.serving.scoring.scores import ScoredSource, Scores

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

# The column that says which part an item belongs to.
PART = "score_part"
# Parts that even a small source has, so that slots end at about the same time; none has fewer images than this.
FEWEST_PARTS, FEWEST_ROWS = 32, 128
# Files that are read and decoded together; rows of a table are there already, and more of them cost less each.
_FILES, _ROWS_OF_A_TABLE = 32, 128
# What gives the images of several sources ids of their own: by whether an id column has the ids.
_ONE_SOURCE = {True: "give their rows ids that no other has", False: "score the folder that has them all below it"}
StoredForm = Literal["pixels", "file", "spark_image", "stored"]
_ITEMS = f"{PART} int, path string, row_group int, first_row long"


@dataclass(frozen=True)
class ImagesToScore:
    """Images before the Spark job reads them.

    source : what is written down of it; its ``rows`` are counted from the source
    form : what a payload is, as `pipeline.ingest.sources.source.Form` says, or an image as shards of a dataset store it
    encoding, shape : of stored images and pixels
    items : DataFrame of work items for a number of parts, with the column `PART`, sorted by ``order`` within a part
    order : columns that make the order of items the same in every run
    item_rows : how many items are read and decoded together
    read : on an executor, a record batch of items -> record batches with the columns id, payload, origin, problem
    """

    source: ScoredSource
    form: StoredForm
    encoding: str
    shape: tuple[int, int, int] | None
    items: Callable[[int], DataFrame]
    order: tuple[str, ...]
    item_rows: int
    read: Callable[[pa.RecordBatch], Iterator[pa.RecordBatch]]

    @property
    def rows(self) -> int:
        """Images to score."""
        return self.source.rows - self.source.already_there


@contextmanager
def opened(
    spark: SparkSession, settings: Settings, classes: tuple[str, ...], *, folder: str, base: Scores | None
) -> Iterator[ImagesToScore]:
    """The images that the settings name, without those that earlier versions of the scores have, while the block runs.

    Parameters
    ----------
    classes : of the model
    folder : of the scores
    base : the version that is added to, if any

    Raises
    ------
    SourceError, DatasetError, ScoreError
        The source is missing, cut or altered, or has images under the ids of others that have been scored.
    """
    wanted = settings.score.source
    if wanted.kind == DATASET:
        yield _dataset_images(spark, settings, base)
        return
    first_id = sum(source.rows for source in base.sources) if base else 0
    cache = storage.join(settings.output, "cache")
    try:
        source = open_source(spark, wanted.as_source(classes), cache, first_id=first_id, labelled=False)
    except SourceError as error:  # it speaks of the settings of `ingest`
        raise SourceError(str(error).replace("dataset.source.", "score.source.")) from None
    try:
        if source.numbered or base is None:
            # Numbered images have no ids of their own: all of a source are there, or none.
            is_there = base is not None and any(each.state == source.state for each in base.sources)
            already_there = sum(source.rows.values()) if is_there else 0
            yield _source_images(spark, settings, source, source, already_there)
            return
        paths = [storage.join(folder, path) for path in (*(part.path for part in base.parts), *base.quarantine)]
        _check_origins(spark, settings, source, base, paths)
        with without_stored(spark, source, paths) as (new, already_there):
            yield _source_images(spark, settings, source, new, already_there)
    finally:
        source.close()


def _check_origins(
    spark: SparkSession, settings: Settings, source: Source, base: Scores, stored: Sequence[str]
) -> None:
    """Raise ScoreError where an image of another folder or table has been scored under the id that one of these has.

    In folders an id stands for a path below the folder, in tables with an id column for a row of that table: the two
    are other images, and this one would pass for scored.
    """
    from pyspark.sql import functions as F

    wanted = settings.score.source
    if wanted.kind in TABLES and not wanted.id_column:
        return  # an id stands for the content
    if all(each.path == wanted.path for each in base.sources):
        return
    root = storage.absolute(wanted.path or "").rstrip("/")
    origin = F.col("origin") if "origin" in source.items.columns else F.concat(F.lit(f"{root}/"), F.col("path"))
    before = stored_origins(spark, stored).withColumnRenamed("origin", "was")
    one = source.items.select("id", origin.alias("now")).join(before, "id").where("was != now").first()
    if one is not None:
        raise ScoreError(
            f"{one['now']} has the id of {one['was']}, which has been scored as another image: ids are "
            f"{'those of the id column' if wanted.id_column else 'paths below score.source.path'}. Choose another "
            f"score.output for each source, or {_ONE_SOURCE[bool(wanted.id_column)]}"
        )


def parts_of(rows: int, part_rows: int) -> int:
    """Into how many parts so many images are cut."""
    return max(1, min(FEWEST_PARTS, rows // FEWEST_ROWS), math.ceil(rows / part_rows))


def dataset_of(settings: Settings) -> str:
    """The path of the dataset whose shards are scored, or that scores are compared with."""
    return storage.absolute(settings.score.source.path or settings.dataset.path)


def row_groups_to_read(
    spark: SparkSession, dataset: str, groups: Sequence[tuple[str, int, int, int]], parts: int
) -> DataFrame:
    """Items for row groups of shards, consecutive ones in a part.

    Parameters
    ----------
    groups : path in the dataset, number in the file, first row in the file, and rows of each
    """
    total, done, rows = sum(group[3] for group in groups), 0, []
    for path, number, first, count in groups:
        rows.append((min(parts - 1, done * parts // max(1, total)), path, number, first))
        done += count
    return spark.createDataFrame(rows, _ITEMS)


def groups_of(manifest: Manifest, splits: Sequence[str], without: frozenset[str] = frozenset()) -> list[
    tuple[str, int, int, int]
]:  # fmt: skip
    """The row groups of some splits as `row_groups_to_read` takes them, but for those of shards to be left out."""
    found = []
    for split in splits:
        for shard in manifest.split(split).shards:
            first = 0
            for number, rows in enumerate(shard.row_groups):
                if shard.path not in without:
                    found.append((shard.path, number, first, rows))
                first += rows
    return found


def read_row_groups(items: pa.RecordBatch, *, dataset: str) -> Iterator[pa.RecordBatch]:
    """On an executor: row groups of shards -> their images as they are stored. A damaged page is an error."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for item in items.to_pylist():
        path = storage.join(dataset, item["path"])
        with (
            storage.open_file(path) as source,
            pq.ParquetFile(source, pre_buffer=False, page_checksum_verification=True) as file,
        ):
            rows = file.read_row_group(item["row_group"], columns=["id", "image"], use_threads=False)
        first = item["first_row"]
        for batch in rows.combine_chunks().to_batches():
            origins = [f"{path}#{number}" for number in range(first, first + batch.num_rows)]
            first += batch.num_rows
            yield pa.RecordBatch.from_arrays(
                [batch.column("id"), batch.column("image"), pa.array(origins), pa.nulls(len(origins), pa.string())],
                names=["id", "payload", "origin", "problem"],
            )


def _dataset_images(spark: SparkSession, settings: Settings, base: Scores | None) -> ImagesToScore:
    path = dataset_of(settings)
    manifest = load_manifest(path)
    split = settings.score.source.split
    splits = [split] if split else [name for name in SPLITS if name in manifest.splits]
    rows = sum(manifest.split(name).rows for name in splits)
    scored = frozenset(shard for source in base.sources for shard in source.shards) if base else frozenset()
    groups = groups_of(manifest, splits, scored)
    shards = tuple(dict.fromkeys(group[0] for group in groups))
    listed = [(shard.path, shard.sha256) for name in splits for shard in manifest.split(name).shards]
    return ImagesToScore(
        source=ScoredSource(
            kind=DATASET,
            path=path,
            fingerprint=digest_of(listed),
            state=digest_of(listed),
            rows=rows,
            already_there=rows - sum(group[3] for group in groups),
            shards=shards,
        ),
        form="stored",
        encoding=manifest.image.encoding,
        shape=manifest.image.shape,
        items=lambda parts: row_groups_to_read(spark, path, groups, parts),
        order=("path", "row_group"),
        item_rows=1,
        read=functools.partial(read_row_groups, dataset=path),
    )


def _source_images(
    spark: SparkSession, settings: Settings, whole: Source, new: Source, already_there: int
) -> ImagesToScore:
    wanted = settings.score.source
    if whole.own_splits and not whole.numbered:
        raise ScoreError(f"score.source.kind {wanted.kind} has splits of its own, which `score` does not know")
    return ImagesToScore(
        source=ScoredSource(
            kind=wanted.kind,
            path=wanted.path or wanted.kind,
            fingerprint=whole.fingerprint,
            state=whole.state,
            rows=sum(whole.rows.values()),
            already_there=already_there,
        ),
        form=whole.form,
        encoding="raw",
        shape=whole.pixel_shape,
        items=functools.partial(_numbered_items if whole.numbered else _items_by_id, spark, new),
        order=("first_id",) if whole.numbered else ("id",),
        item_rows=1 if whole.numbered else _ROWS_OF_A_TABLE if wanted.kind in TABLES else _FILES,
        read=whole.read,
    )


def _items_by_id(spark: SparkSession, source: Source, parts: int) -> DataFrame:
    from pyspark.sql import functions as F

    return source.items.withColumn(PART, F.pmod(F.xxhash64("id"), F.lit(parts)).cast("int"))


def _numbered_items(spark: SparkSession, source: Source, parts: int) -> DataFrame:
    """Slices of files, one after the other: few enough to be counted here."""
    slices = source.items.orderBy("first_id").collect()
    rows = [(number * parts // len(slices), *row) for number, row in enumerate(slices)]
    return spark.createDataFrame(rows, f"{PART} int, first_id long, part int, start long, end long")
