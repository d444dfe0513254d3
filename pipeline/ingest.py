"""The Spark job from a source to a dataset: check, set bad rows aside, split, shuffle, write shards, publish.

One pass and one shuffle. Where a row goes depends on its id and the seed alone, so the same input and settings give
the same files, byte for byte, and the same manifest digest. A task publishes each shard whole under its final name
and reports it; the manifest lists what tasks that succeeded reported, and makes the dataset exist.
"""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline import images, manifest, storage
from pipeline.config import DatasetSettings, digest_of
from pipeline.manifest import DatasetError, Manifest, Shard, Split
from pipeline.progress import spark_tasks
from pipeline.session import spark_reason
from pipeline.sources import Source, open_source

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

QUARANTINE = "quarantine"
# A share of rows is compared as hash % this.
_SHARE_STEPS = 1_000_000
_SHARD_SCHEMA = pa.schema(
    [
        pa.field("id", pa.int64(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
    ]
)
_QUARANTINE_SCHEMA = pa.schema([("id", pa.int64()), ("origin", pa.string()), ("reason", pa.string())])


class IngestError(RuntimeError):
    """The Spark job failed; the message says why."""


@dataclass(frozen=True)
class Layout:
    """What a task that writes shards must know; plain values, since it is pickled.

    splits : (name, shards) of each split; shards are numbered through all splits in this order, quarantine last
    """

    dataset: str
    prefix: str
    splits: tuple[tuple[str, int], ...]
    image_shape: tuple[int, int, int]
    num_classes: int
    row_group_rows: int

    def split_of(self, shard: int) -> tuple[str, int]:
        """The split that a shard belongs to, and its number inside it."""
        for name, count in self.splits:
            if shard < count:
                return name, shard
            shard -= count
        raise AssertionError(f"shard {shard} is past the last split")


def ingest(spark: SparkSession, settings: DatasetSettings, *, cache: str) -> tuple[Manifest, bool]:
    """Make the dataset of the settings, or find it made already.

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
    source = open_source(settings.source, cache)
    settings_digest = _settings_digest(settings, source)
    if existing := _existing(dataset, settings_digest):
        return existing, False
    _remove_leftovers(dataset)
    layout = _layout(dataset, settings, source, settings_digest)
    try:
        records = _run(spark, source, settings, layout)
        made = _manifest(records, source, settings, settings_digest, spark.sparkContext.applicationId)
        _check_bad_share(made, settings, dataset)
        if missing := _missing_shard(dataset, made):
            raise DatasetError(
                f"an executor wrote {missing}, but the driver does not see it: "
                "set dataset.path to a place that the driver and all executors share"
            )
        return manifest.publish(dataset, made), True
    except BaseException:
        _remove_leftovers(dataset, keep_quarantine=True)
        raise


def _settings_digest(settings: DatasetSettings, source: Source) -> str:
    """Of what decides the content: the source's fingerprint instead of its place, nothing of where the dataset is."""
    content = settings.model_dump(mode="json", exclude={"path": True, "source": {"path"}})
    return digest_of({**content, "fingerprint": source.fingerprint, "format": manifest.FORMAT})


def _existing(dataset: str, settings_digest: str) -> Manifest | None:
    """The dataset at this path where it is the one asked for and whole; an error where it is another one."""
    if not storage.exists(storage.join(dataset, manifest.FILE_NAME)):
        return None
    found = manifest.load(dataset)
    if found.settings_digest != settings_digest:
        raise DatasetError(
            f"{dataset} holds {found.name}, ingested from other input or with other settings "
            f"({found.settings_digest[:15]}..., these are {settings_digest[:15]}...): "
            "choose another dataset.path, or delete that folder first"
        )
    if missing := _missing_shard(dataset, found):
        log.warning("%s is missing or cut: ingesting again", missing)
        return None
    return found


def _missing_shard(dataset: str, made: Manifest) -> str | None:
    """The first shard that is not there with all its bytes, as the driver sees it."""
    for split in made.splits.values():
        for shard in split.shards:
            fs, path = storage.filesystem(storage.join(dataset, shard.path))
            if not fs.exists(path) or fs.size(path) != shard.bytes:
                return path
    return None


def _remove_leftovers(dataset: str, *, keep_quarantine: bool = False) -> None:
    """Delete what a job that did not finish has left, and nothing that ingest does not write."""
    folders = manifest.SPLITS if keep_quarantine else (*manifest.SPLITS, QUARANTINE)
    storage.remove(storage.join(dataset, manifest.FILE_NAME))
    for folder in folders:
        path = storage.join(dataset, folder)
        for name in storage.names(path):
            if name.startswith("part-") and name.endswith(".parquet"):
                storage.remove(storage.join(path, name))


def _layout(dataset: str, settings: DatasetSettings, source: Source, settings_digest: str) -> Layout:
    held_out = source.rows["train"] * settings.validation_share
    expected = {
        "train": source.rows["train"] - held_out,
        "validation": held_out,
        "test": source.rows["test"],
    }
    splits = [(name, max(1, round(rows / settings.shard_rows))) for name, rows in expected.items() if rows]
    return Layout(
        dataset,
        "part-" + settings_digest.removeprefix("sha256:")[:8],
        (*splits, (QUARANTINE, 1)),
        source.image_shape,
        len(source.classes),
        settings.row_group_rows,
    )


def _run(spark: SparkSession, source: Source, settings: DatasetSettings, layout: Layout) -> list[dict[str, Any]]:
    """Run the job; the records of all files that were written."""
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException

    try:
        with spark_tasks(spark, f"ingest {settings.name}"):
            return [json.loads(row.record) for row in _job(spark, source, settings, layout).collect()]
    except (PySparkException, Py4JError) as error:
        raise IngestError(f"the Spark job failed: {spark_reason(error)}") from error


def _job(spark: SparkSession, source: Source, settings: DatasetSettings, layout: Layout) -> DataFrame:
    from pyspark.sql import functions as F

    def check(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _check(batches, layout)

    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        return _write(batches, layout)

    checked = source.read(spark).mapInArrow(
        check, "id long, split string, label int, image binary, origin string, reason string"
    )
    share = F.pmod(F.xxhash64(F.lit(settings.seed), F.lit("split"), "id"), F.lit(_SHARE_STEPS))
    held_out = (F.col("split") == "train") & (share < int(settings.validation_share * _SHARE_STEPS))
    split = F.when(F.col("reason").isNotNull(), QUARANTINE).when(held_out, "validation").otherwise(F.col("split"))
    shuffled = checked.withColumn("split", split).withColumn("key", F.xxhash64(F.lit(settings.seed), "id"))
    shard, first = F.lit(0), 0
    for name, count in layout.splits:
        shard = F.when(F.col("split") == name, first + F.pmod(F.col("key"), F.lit(count))).otherwise(shard)
        first += count
    return (
        shuffled.withColumn("shard", shard.cast("int"))
        .repartition(first, "shard")
        .sortWithinPartitions("shard", "key", "id")
        .select("shard", "id", "label", "image", "origin", "reason")
        .mapInArrow(write, "record string")
    )


def _check(batches: Iterator[pa.RecordBatch], layout: Layout) -> Iterator[pa.RecordBatch]:
    """On an executor: give each row a reason to be set aside, or null; rows set aside lose their payload."""
    image_bytes = math.prod(layout.image_shape)
    for batch in batches:
        payloads, labels = batch.column("payload"), batch.column("label")
        reasons = images.reasons_against(payloads, labels, image_bytes=image_bytes, num_classes=layout.num_classes)
        kept = pc.if_else(reasons.is_null(), payloads, pa.scalar(None, payloads.type))
        yield pa.RecordBatch.from_arrays(
            [batch.column("id"), batch.column("split"), labels, kept, batch.column("origin"), reasons],
            names=["id", "split", "label", "image", "origin", "reason"],
        )


def _write(batches: Iterator[pa.RecordBatch], layout: Layout) -> Iterator[pa.RecordBatch]:
    """On an executor: rows sorted by shard -> published files, one record of each."""
    for shard, rows in _by_shard(batches):
        split, number = layout.split_of(shard)
        path = f"{split}/{layout.prefix}-{number:05d}.parquet"
        if split == QUARANTINE:
            record = _write_quarantine(storage.join(layout.dataset, path), rows)
        else:
            record = _write_shard(storage.join(layout.dataset, path), rows, layout)
        text = json.dumps({"split": split, "path": path, **record})
        yield pa.RecordBatch.from_pydict({"record": pa.array([text], pa.string())})


def _by_shard(batches: Iterator[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
    """Consecutive rows of one shard, as one table each."""
    current = -1
    parts: list[pa.RecordBatch] = []
    for batch in batches:
        shards = batch.column("shard").to_numpy()
        cuts = [0, *(np.flatnonzero(np.diff(shards)) + 1), len(shards)]
        for start, end in itertools.pairwise(cuts):
            if start == end:
                continue
            if shards[start] != current and parts:
                yield current, pa.Table.from_batches(parts)
                parts = []
            current = int(shards[start])
            parts.append(batch.slice(start, end - start))
    if parts:
        yield current, pa.Table.from_batches(parts)


def _write_shard(path: str, rows: pa.Table, layout: Layout) -> dict[str, Any]:
    """Write and publish one shard; its record, with exact integer sums for the statistics of the split."""
    buffer = io.BytesIO()
    sums = np.zeros((2, layout.image_shape[0]), dtype=np.int64)
    groups = []
    # No statistics and no dictionary on `image`: they would copy whole images into the footer.
    with pq.ParquetWriter(
        buffer, _SHARD_SCHEMA, compression="none", use_dictionary=["label"], write_statistics=["id", "label"]
    ) as writer:
        for start in range(0, rows.num_rows, layout.row_group_rows):
            group = rows.slice(start, layout.row_group_rows).select(_SHARD_SCHEMA.names).cast(_SHARD_SCHEMA)
            writer.write_table(group, row_group_size=layout.row_group_rows)
            groups.append(group.num_rows)
            for chunk in group.column("image").chunks:
                pixels = images.as_rows(chunk, math.prod(layout.image_shape))
                assert pixels is not None, "rows of another size were set aside"
                sums += _channel_sums(pixels.reshape(-1, *layout.image_shape))
    data = buffer.getvalue()
    storage.publish(path, data)
    counts = np.bincount(rows.column("label").to_numpy(), minlength=layout.num_classes)
    return {
        "rows": rows.num_rows,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "row_groups": groups,
        "label_counts": counts.tolist(),
        "sums": sums.tolist(),
    }


def _channel_sums(pixels: np.ndarray) -> np.ndarray:
    """Per channel the sum of values and of their squares: int64 (2, C), exact, from a histogram of uint8 values."""
    values = np.arange(256, dtype=np.int64)
    counts = [np.bincount(pixels[:, c].ravel(), minlength=256) for c in range(pixels.shape[1])]
    return np.array([[count @ values for count in counts], [count @ values**2 for count in counts]])


def _write_quarantine(path: str, rows: pa.Table) -> dict[str, Any]:
    buffer = io.BytesIO()
    pq.write_table(rows.select(_QUARANTINE_SCHEMA.names).cast(_QUARANTINE_SCHEMA), buffer)
    storage.publish(path, buffer.getvalue())
    return {"rows": rows.num_rows, "reasons": Counter(rows.column("reason").to_pylist())}


def _manifest(
    records: list[dict[str, Any]],
    source: Source,
    settings: DatasetSettings,
    settings_digest: str,
    application: str,
) -> Manifest:
    reasons: Counter[str] = Counter()
    by_split: dict[str, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda record: record["path"]):
        if record["split"] == QUARANTINE:
            reasons.update(record["reasons"])
        else:
            by_split.setdefault(record["split"], []).append(record)
    return manifest.seal(
        Manifest(
            name=settings.name,
            settings_digest=settings_digest,
            spark_application=application,
            image=manifest.Image(encoding="raw", shape=source.image_shape),
            classes=source.classes,
            input_rows=sum(source.rows.values()),
            set_aside=dict(sorted(reasons.items())),
            splits={n: _split(by_split[n], source.image_shape) for n in manifest.SPLITS if n in by_split},
        )
    )


def _split(records: list[dict[str, Any]], image_shape: tuple[int, int, int]) -> Split:
    rows = sum(record["rows"] for record in records)
    pixels = rows * image_shape[1] * image_shape[2]
    first, second = np.sum([record["sums"] for record in records], axis=0).tolist()
    means = [value / pixels for value in first]
    deviations = [math.sqrt(max(0.0, square / pixels - m * m)) for square, m in zip(second, means, strict=True)]
    fields = Shard.model_fields
    return Split(
        rows=rows,
        label_counts=tuple(np.sum([record["label_counts"] for record in records], axis=0).tolist()),
        mean=tuple(value / 255 for value in means),
        std=tuple(value / 255 for value in deviations),
        shards=tuple(Shard(**{name: record[name] for name in fields}) for record in records),
    )


def _check_bad_share(made: Manifest, settings: DatasetSettings, dataset: str) -> None:
    aside = sum(made.set_aside.values())
    if aside > settings.max_bad_share * made.input_rows:
        most = ", ".join(f"{reason} {count}" for reason, count in Counter(made.set_aside).most_common(3))
        raise DatasetError(
            f"{aside} of {made.input_rows} rows cannot be used ({most}), more than dataset.max_bad_share "
            f"{settings.max_bad_share}: see {storage.join(dataset, QUARANTINE)} for each, mend the source or raise it"
        )
    if not made.splits.get("train"):
        raise DatasetError("no row is left for the split `train`")
