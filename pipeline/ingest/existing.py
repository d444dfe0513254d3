"""What is at a dataset's path already: the same, something to add to, another dataset, or what a dead job left."""

from __future__ import annotations

import logging
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.config.dataset import DatasetSettings
from pipeline.config.settings import digest_of
from pipeline.data import load_manifest, manifest
from pipeline.data.manifest import DatasetError, Manifest
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.sources.source import NO_SPLIT, Source, exact_path
from pipeline.ingest.tasks import QUARANTINE

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

log = logging.getLogger(__name__)

# Names that `ingest` gives to shards; Spark's own start alike.
_SHARD_NAME = re.compile(r"part-[0-9a-f]{8}-\d{5,}\.parquet")


def published(dataset: str) -> Manifest | None:
    """The newest version of the dataset, if there is one."""
    return load_manifest(dataset) if storage.exists(storage.join(dataset, manifest.FILE_NAME)) else None


def settings_digest(settings: DatasetSettings, source: Source) -> str:
    """Of what decides the content: the source's fingerprint instead of its place, nothing of where the dataset is."""
    nowhere: Any = {"path": True, "version": True, "append": True, "max_bad_share": True, "source": {"path", "labels"}}
    content = settings.model_dump(mode="json", exclude=nowhere)
    return digest_of({**content, "fingerprint": source.fingerprint, "format": manifest.FORMAT})


def is_there(dataset: str, found: Manifest, settings_digest: str, source: Source) -> bool:
    """Whether this input went into the dataset with these settings, and the dataset is whole.

    Raises
    ------
    DatasetError
        It went in, but files of the source were written again since, or shards of several versions are gone.
    """
    made = [ingested for ingested in found.sources if ingested.settings_digest == settings_digest]
    if not made:
        return False
    if made[-1].state != source.state:
        raise DatasetError(
            f"{dataset} was ingested from this source, but files of the source were written again since: delete that "
            "folder to ingest it anew, or choose another dataset.path"
        )
    if missing := missing_shard(dataset, found):
        if found.version > 1:
            raise DatasetError(
                f"{missing} is missing or cut: restore it, or delete {dataset} and ingest its sources anew"
            )
        log.warning("%s is missing or cut: ingesting again", missing)
        return False
    return True


def check_append(
    dataset: str, found: Manifest, settings: DatasetSettings, source: Source, image: ImageSpec, settings_digest: str
) -> None:
    """Something else is at this path: only `append` may add to it, and only images and classes of its kind."""
    if not settings.append:
        if settings_digest == found.settings_digest:
            return  # the same one, cut
        raise DatasetError(
            f"{dataset} holds {found.name}, ingested from other input or with other settings "
            f"({found.settings_digest[:15]}..., these are {settings_digest[:15]}...): "
            "choose another dataset.path, delete that folder first, or set dataset.append to add what is new"
        )
    if (found.image.shape, found.image.encoding) != (image.shape, image.encoding):
        raise DatasetError(
            f"{dataset} has {found.image.encoding} images of shape {list(found.image.shape)}, these would be "
            f"{image.encoding} of {list(image.shape)}: set dataset.image alike, or choose another dataset.path"
        )
    if found.classes != source.classes:
        raise DatasetError(
            f"{dataset} has the classes {', '.join(found.classes)}; the source has {', '.join(source.classes)}: "
            "set dataset.source.classes to those of the dataset (images of others are then set aside)"
        )
    if source.numbered and any(ingested.state == source.state for ingested in found.sources):
        raise DatasetError(
            f"{dataset} has all images of {settings.source.kind} {settings.source.path or ''} already, ingested with "
            "other settings: they would be in it twice"
        )
    if missing := missing_shard(dataset, found):
        raise DatasetError(f"{missing} is missing or cut: restore it before anything is appended to {dataset}")


def only_new(spark: SparkSession, source: Source, dataset: str, before: Manifest) -> tuple[Source, int]:
    """The source without the images that the dataset has or has set aside, and how many those are."""
    from pyspark.sql import functions as F

    there = [shard.path for split in before.splits.values() for shard in split.shards] + list(before.quarantine)
    files = [exact_path(storage.join(dataset, path)) for path in there]
    known = spark.read.schema("id long").parquet(*files).distinct()
    new = source.items.join(known, "id", "left_anti")
    key = F.coalesce(F.col("split"), F.lit(NO_SPLIT)) if source.own_splits else F.lit("")
    counts = {row["key"]: row["count"] for row in new.groupBy(key.alias("key")).count().collect()}
    if not counts:
        raise DatasetError(
            f"{dataset} already has all {sum(source.rows.values())} images of the source: nothing to append"
        )
    # A split of which nothing is new is one that the source has, still.
    rows = {split: counts.get(split, 0) for split in source.rows}
    return replace(source, items=new, rows=rows), sum(source.rows.values()) - sum(rows.values())


def missing_shard(dataset: str, made: Manifest) -> str | None:
    """The first shard that is not there with all its bytes, as the driver sees it."""
    for name, split in made.splits.items():
        sizes = _sizes(storage.join(dataset, name))
        for shard in split.shards:
            if sizes.get(shard.path.rpartition("/")[2]) != shard.bytes:
                return storage.join(dataset, shard.path)
    return None


def _sizes(folder: str) -> dict[str, int]:
    """Bytes of each file in a folder as it is now: executors have written since it was last looked at."""
    fs, inner = storage.filesystem(folder)
    fs.invalidate_cache(inner)
    try:
        return {entry["name"].rpartition("/")[2]: entry["size"] for entry in fs.ls(inner, detail=True)}
    except (FileNotFoundError, NotADirectoryError):
        return {}


def remove_leftovers(dataset: str, found: Manifest | None, *, keep_quarantine: bool = False) -> None:
    """Delete what a job that did not finish has left, nothing that ingest does not write, and nothing published."""
    kept = set(found.quarantine) if found else set()
    if found is None:
        storage.remove(storage.join(dataset, manifest.FILE_NAME))
    else:
        kept |= {shard.path for split in found.splits.values() for shard in split.shards}
    for folder in manifest.SPLITS if keep_quarantine else (*manifest.SPLITS, QUARANTINE):
        for name in storage.names(storage.join(dataset, folder)):
            if _SHARD_NAME.fullmatch(name) and f"{folder}/{name}" not in kept:
                storage.remove(storage.join(dataset, folder, name))


def clean_up(dataset: str) -> None:
    """Delete the shards of a job that failed, unless it failed after its manifest was published."""
    try:
        remove_leftovers(dataset, published(dataset), keep_quarantine=True)
    except (OSError, ValueError) as error:  # the error that led here is the one to see; the next run cleans up
        log.warning("shards of the failed job are still in %s: %s", dataset, error)
