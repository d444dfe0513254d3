"""What is at a dataset's path already: the same, a version to add to, another dataset, or what a dead job left."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.cluster.errors import spark_failures
from pipeline.config.dataset import DatasetSettings, SourceSettings
from pipeline.config.identity import identity_of
from pipeline.config.settings import digest_of
from pipeline.data import manifest, versions
from pipeline.data.manifest import QUARANTINE, SPLITS, DatasetError, Manifest
from pipeline.ingest.claim import Claim
from pipeline.ingest.images import ImageSpec
from pipeline.ingest.listed_images import listed_image
from pipeline.ingest.sources.source import Source, rows_by_split
from pipeline.ingest.stored import stored_ids, stored_labels

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

log = logging.getLogger(__name__)

# The driver and every executor hold a list of ids of at most this length (128 MiB, as Spark's own metric says); with
# longer ones Spark shuffles the items, payloads included.
MOST_BROADCAST_IDS = 2_000_000
# What the id of an image is, for people whose images were there already.
IDS = "for a folder: the path below it; for a table: its id_column, or a hash of label and image"
# Names that `ingest` gives to shards (those of sparknorm 0.7 and before end with the number); Spark's own start alike.
_SHARD_NAME = re.compile(r"part-[0-9a-f]{8}-\d{5,}(-[0-9a-f]{12})?\.parquet")


def published(dataset: str) -> Manifest | None:
    """The newest version of the dataset, if there is one.

    Raises
    ------
    DatasetError
        ``manifest.json`` is missing, and there are shards that no version lists: they may be a version's that only it
        has listed.
    """
    found = versions.newest(dataset)
    if found is None or storage.exists(storage.join(dataset, versions.FILE_NAME)):
        return found
    if unlisted := _unlisted(dataset, found, SPLITS):
        raise DatasetError(
            f"{storage.join(dataset, versions.FILE_NAME)} is missing, and no version up to {found.version} lists "
            f"{unlisted[0]}: restore that file, or, if {found.version} is the newest version, copy "
            f"{versions.file_name(found.version)} to it"
        )
    return found


def settings_digest(settings: DatasetSettings, source: Source) -> str:
    """The digest of what decides the content: the source's fingerprint instead of its place, no path of the dataset."""
    elsewhere: Any = {
        "path": True,
        "version": True,
        "append": True,
        "max_bad_share": True,
        "source": {"path", "labels"},
    }
    content = identity_of("dataset", settings, exclude=elsewhere)
    return digest_of({**content, "fingerprint": source.fingerprint, "format": manifest.FORMAT})


def holds(dataset: str, published: Manifest, settings_digest: str, source: Source) -> bool:
    """Whether this input went into the published dataset with these settings, and the dataset is whole.

    Raises
    ------
    DatasetError
        It went in, but files of the source were written again since, or shards of several versions are gone.
    """
    same_input = [ingested for ingested in published.sources if ingested.settings_digest == settings_digest]
    if not same_input:
        return False
    if same_input[-1].state != source.state:
        raise DatasetError(
            f"{dataset} was ingested from this source, but files of the source were written again since: delete that "
            "folder to ingest it anew, or choose another dataset.path"
        )
    if missing := missing_shard(dataset, published):
        if published.version > 1:
            raise DatasetError(
                f"{missing} is missing or cut: restore it, or delete {dataset} and ingest its sources anew"
            )
        log.warning("%s is missing or cut: ingesting again", missing)
        return False
    return True


def check_append(
    dataset: str, published: Manifest, settings: DatasetSettings, source: Source, image: ImageSpec, settings_digest: str
) -> None:
    """Check that a source which the published dataset does not hold may be ingested to its path.

    Raises
    ------
    DatasetError
        ``append`` is not set, images or classes are of another kind, the images are in it already, or a shard is gone.
    """
    if not settings.append:
        if settings_digest == published.settings_digest:
            return  # the same one, cut
        raise DatasetError(
            f"{dataset} holds {published.name}, ingested from other input or with other settings "
            f"({published.settings_digest[:15]}..., these are {settings_digest[:15]}...): "
            "choose another dataset.path, delete that folder first, or set dataset.append to add what is new"
        )
    listed = listed_image(image)
    if (published.image.shape, published.image.encoding) != (listed.shape, listed.encoding):
        raise DatasetError(
            f"{dataset} has {published.image.encoding} images of shape {list(published.image.shape)}, these would be "
            f"{image.encoding} of {list(image.shape)}: set dataset.image alike, or choose another dataset.path"
        )
    if published.image != listed:
        raise DatasetError(
            f"{dataset} was made with dataset.image {_made(published.image)}, these would be with {_made(listed)}: set "
            "it alike, or choose another dataset.path"
        )
    if published.preparation and (was := _finished(published.preparation, image)) != (now := _finished(image, image)):
        raise DatasetError(
            f"{dataset} was made with dataset.image {was}, these would be with {now}: set it alike, or choose another "
            "dataset.path"
        )
    if published.classes != source.classes:
        raise DatasetError(
            f"{dataset} has the classes {', '.join(published.classes)}; the source has {', '.join(source.classes)}: "
            "set dataset.source.classes to those of the dataset (images of others are then set aside)"
        )
    if source.numbered and any(ingested.state == source.state for ingested in published.sources):
        raise DatasetError(
            f"{dataset} has all images of {settings.source.kind} {settings.source.path or ''} already, ingested with "
            "other settings: they would be in it twice"
        )
    if missing := missing_shard(dataset, published):
        raise DatasetError(f"{missing} is missing or cut: restore it before anything is appended to {dataset}")


def _made(image: manifest.Image) -> str:
    """The settings by which images were made that neither shape nor encoding tell, in words."""
    margin = "" if image.decode_margin is None else f", decode_margin {image.decode_margin:g}"
    return f"decode {image.decode}{margin}, keep_jpeg {str(image.keep_jpeg).lower()}"


def _finished(made: manifest.Preparation | ImageSpec, image: ImageSpec) -> str:
    """The settings of what is done to decoded pixels, in words."""
    quality = f", jpeg_quality {made.jpeg_quality}" if image.encoding == "jpeg" else ""
    return f"resize {made.resize}, background {made.background}{quality}"


@contextmanager
def only_new(
    spark: SparkSession, source: Source, settings: SourceSettings, dataset: str, base: Manifest | None
) -> Iterator[tuple[Source, int]]:
    """The source without the images that the version before has or has set aside, and how many those are.

    Ids of numbered images go on from the version before, so that all of them are new. What Spark holds for this is let
    go where the context ends.

    Raises
    ------
    DatasetError
        Nothing is new.
    """
    if base is None or source.numbered:
        yield source, 0
        return
    paths = [*(shard.path for shard in base.shards), *base.quarantine]
    with without_stored(spark, source, [storage.join(dataset, path) for path in paths]) as (new, already_there):
        if already_there and (settings.labels or settings.id_column):  # else an id stands for the label, too
            _warn_of_other_labels(spark, source, dataset, base)
        if not any(new.rows.values()):
            raise DatasetError(
                f"{dataset} already has all {sum(source.rows.values())} images of the source: nothing to append. "
                f"Images are known by their ids ({IDS}): one that was mended or replaced needs another name or id, or "
                "a new dataset"
            )
        yield new, already_there


def _warn_of_other_labels(spark: SparkSession, source: Source, dataset: str, base: Manifest) -> None:
    """Ids that were given to other images, or labels that were mended: neither comes in, which should not go unseen."""
    stored = stored_labels(spark, [storage.join(dataset, shard.path) for shard in base.shards])
    pairs = source.items.select("id", "label").join(stored.withColumnRenamed("label", "stored"), "id")
    if differing := pairs.where("label >= 0 and label != stored").count():
        log.warning(
            "%d images of the source have another label than the images of the same ids in %s, which stay as they are: "
            "these are other images, which need ids of their own, or their labels were changed",
            differing,
            dataset,
        )


@contextmanager
def without_stored(spark: SparkSession, source: Source, paths: Sequence[str]) -> Iterator[tuple[Source, int]]:
    """The source without the images whose ids are in the column ``id`` of Parquet files, and how many those are. What
    Spark holds for this is let go where the context ends."""
    with _ids_with_known(source, stored_ids(spark, paths).distinct()) as ids:
        counts = _rows_of_new(ids, source)
        # A split of which nothing is new is one that the source has, still.
        rows = {split: counts.get(split, 0) for split in source.rows}
        already_there = sum(source.rows.values()) - sum(rows.values())
        new = _new_items(source.items, ids, sum(rows.values()), already_there)
        yield replace(source, items=new, rows=rows), already_there


@contextmanager
def _ids_with_known(source: Source, stored: DataFrame) -> Iterator[DataFrame]:
    """Id and split of each item, and ``known``, whether it is stored. Persisted: an id may be a hash of its payload."""
    from pyspark.sql import functions as F

    ids = source.items.select("id", "split").join(stored.withColumn("known", F.lit(True)), "id", "left")
    ids = ids.withColumn("known", F.col("known").isNotNull()).persist()
    try:
        yield ids
    finally:
        with suppress(*spark_failures()):  # a session that died holds nothing
            ids.unpersist()


def _rows_of_new(ids: DataFrame, source: Source) -> dict[str, int]:
    new = ids.where("not known")
    return rows_by_split(new) if source.own_splits else {"": new.count()}


def _new_items(items: DataFrame, ids: DataFrame, new: int, known: int) -> DataFrame:
    """The items that are new. Their payloads stay where they are, unless both lists of ids are too long for that."""
    from pyspark.sql import functions as F

    if not known:
        return items
    chosen = ids.where("not known" if new <= known else "known").select("id").distinct()
    if min(new, known) <= MOST_BROADCAST_IDS:
        chosen = F.broadcast(chosen)
    return items.join(chosen, "id", "left_semi" if new <= known else "left_anti")


def missing_shard(dataset: str, listed: Manifest) -> str | None:
    """The path of the first shard that the driver does not see with all its bytes; None where all are whole."""
    for name, split in listed.splits.items():
        sizes = _sizes(storage.join(dataset, name))
        for shard in split.shards:
            if sizes.get(shard.path.rpartition("/")[2]) != shard.bytes:
                return storage.join(dataset, shard.path)
    return None


def _sizes(folder: str) -> dict[str, int]:
    """Bytes of each file in a folder as it is now: executors have written since it was last looked at."""
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in storage.entries(folder)}


def remove_leftovers(dataset: str, newest: Manifest, claim: Claim) -> None:
    """Delete what jobs that have died left: the shards that no version lists, now that ``newest`` is published.

    Before that, such a shard may be one of a job that is about to publish it.
    """
    with _only_a_warning(dataset):
        _remove(dataset, _unlisted(dataset, newest, (*SPLITS, QUARANTINE)), claim)


def clean_up(dataset: str, prefix: str, claim: Claim) -> None:
    """Delete the shards of this job, which failed; what was set aside stays, for people to look at.

    Parameters
    ----------
    prefix : see `layout.Layout`
    """
    with _only_a_warning(dataset):
        unlisted = _unlisted(dataset, versions.newest(dataset), SPLITS)
        mine = [path for path in unlisted if path.rpartition("/")[2].startswith(f"{prefix}-")]
        _remove(dataset, mine, claim)


@contextmanager
def _only_a_warning(dataset: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - how the job ended matters more, and a later one cleans up
        log.warning("shards that no version lists are still in %s: %s", dataset, error)


def _unlisted(dataset: str, newest: Manifest | None, folders: tuple[str, ...]) -> list[str]:
    """Paths, in the dataset, of the files in some of its folders that ingest has written and no version lists."""
    listed = {*(shard.path for shard in newest.shards), *newest.quarantine} if newest else set()
    found = (
        f"{folder}/{name}"
        for folder in folders
        for name in storage.names(storage.join(dataset, folder))
        if _SHARD_NAME.fullmatch(name)
    )
    return [path for path in found if path not in listed]


def _remove(dataset: str, paths: list[str], claim: Claim) -> None:
    """Delete files while the claim holds: a job that has taken over may write the same names."""
    for path in paths:
        if not claim.holds():
            return
        storage.remove(storage.join(dataset, path))
