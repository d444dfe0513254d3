"""From a source to a dataset: check, set bad rows aside, split, shuffle, write shards, publish.

The same input, settings and seed give the same files, byte for byte, and the same manifest digest. The manifest lists
what tasks that succeeded reported, and makes the dataset exist. Appending writes more shards and publishes a manifest
of both; what was there is not touched.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import numpy as np

from pipeline import storage
from pipeline.cluster.errors import spark_failures, spark_reason
from pipeline.config.dataset import ANY_EXTENSION, DatasetSettings
from pipeline.config.frozen import FrozenModel
from pipeline.config.settings import Settings
from pipeline.data import manifest, reasons, versions
from pipeline.data.manifest import QUARANTINE, SPLITS, DatasetError, Ingested, Manifest, Split
from pipeline.ingest import executors, existing, transform
from pipeline.ingest.claim import Claim, claimed
from pipeline.ingest.images import image_spec
from pipeline.ingest.layout import Layout, plan_layout
from pipeline.ingest.listed_images import listed_image, preparation
from pipeline.ingest.sources.file_names import OtherFiles
from pipeline.ingest.sources.open import open_source
from pipeline.ingest.tasks import WrittenQuarantine, WrittenShard
from pipeline.storage.writable import prepare_output

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from pipeline.ingest.sources.source import Source

log = logging.getLogger(__name__)

# How often a job begins anew because another one published a version while it looked at what is there.
_MOST_TRIES = 5


class IngestError(RuntimeError):
    """The Spark job failed; the message says why."""


class IngestResult(FrozenModel):
    """What `ingest.json` holds.

    dataset : path of the dataset, as the settings name it
    written : False where the same input and settings had been ingested before
    digest : of the manifest
    rows : images of each split
    set_aside : images in quarantine, by reason
    already_there : images of the source that were left out, since the dataset that was added to has their ids
    other_files : what lies in a folder of images and was passed over, since its name is not that of an image
    """

    dataset: str
    written: bool
    digest: str
    rows: dict[str, int]
    set_aside: dict[str, int]
    already_there: int
    other_files: OtherFiles


def ingest(spark: SparkSession, settings: Settings) -> IngestResult:
    """Make the dataset of the settings, or add to it, and leave the result in ``<output>/ingest.json``.

    What has to be fetched is kept in ``<output>/cache``. The result of an earlier call is removed first, so that a
    failure cannot look like it.

    Raises
    ------
    NotWritableError
        ``output`` cannot be written.
    SourceError, FashionMnistError, DatasetError, IngestError
        See `ingest_dataset`.
    """
    prepare_output(settings.output, "ingest.json")
    dataset, written, others = _ingest(spark, settings.dataset, storage.join(settings.output, "cache"))
    result = IngestResult(
        dataset=settings.dataset.path,
        written=written,
        digest=dataset.digest,
        rows={name: split.rows for name, split in dataset.splits.items()},
        set_aside=dataset.set_aside,
        already_there=dataset.sources[-1].already_there if written else 0,
        other_files=others,
    )
    storage.publish_json(storage.join(settings.output, "ingest.json"), result)
    return result


def ingest_dataset(spark: SparkSession, settings: DatasetSettings, *, cache: str) -> tuple[Manifest, bool]:
    """Make the dataset of the settings, add to it, or find it made already.

    Parameters
    ----------
    cache : folder for what has to be fetched

    Returns
    -------
    (manifest, written) : ``written`` is False where the same input and settings have already been ingested

    Raises
    ------
    SourceError, FashionMnistError
        The source is missing, cut or altered.
    DatasetError
        Another dataset is at this path, or would be read as images of the source, another job is writing to it, or more
        than ``max_bad_share`` of the rows had to be set aside.
    ValueError
        Executors have several versions of what the bytes of shards hang on, or ``path`` cannot be written.
    IngestError
        The Spark job failed.
    """
    dataset, written, _ = _ingest(spark, settings, cache)
    return dataset, written


def _ingest(spark: SparkSession, settings: DatasetSettings, cache: str) -> tuple[Manifest, bool, OtherFiles]:
    dataset = storage.absolute(settings.path)
    _check_apart(dataset, settings)
    with _spark_errors_as_one_line():
        for _ in range(_MOST_TRIES):
            published = existing.published(dataset)
            base = published if settings.append else None  # the version that is added to
            with closing(open_source(spark, settings.source, cache, base=base)) as source:
                coming = _coming(dataset, published, settings, source)
                if coming is None:
                    assert published is not None
                    versions.mend_pointer(dataset, published)
                    return published, False, source.other_files
                with claimed(dataset, _application(spark)) as claim:
                    # Unchanged since it was looked at, and from here on nobody else writes.
                    if existing.published(dataset) == published:
                        written = _write(spark, settings, dataset, source, coming, published, claim)
                        return written, True, source.other_files
            log.warning("another job has published a version of %s meanwhile: looking at it again", dataset)
    raise DatasetError(f"{dataset}: {_MOST_TRIES} times in a row another job published a version first; run this again")


def _check_apart(dataset: str, settings: DatasetSettings) -> None:
    """A folder of which every file is taken for an image must not have the dataset itself in it."""
    source = settings.source
    if source.kind != "folder" or ANY_EXTENSION not in source.extensions:
        return
    places = [storage.absolute(source.path or ""), dataset]
    if all(map(storage.is_local, places)):
        places = [os.path.realpath(place) for place in places]
    root, inside = (storage.join(place, "") for place in places)
    is_listed = not any(part.startswith(".") for part in inside.removeprefix(root).split("/"))
    if inside.startswith(root) and is_listed:
        raise DatasetError(
            f"dataset.path {settings.path} is in dataset.source.path {source.path}, of which every file is taken for "
            "an image (dataset.source.extensions): choose another dataset.path"
        )


def _coming(dataset: str, published: Manifest | None, settings: DatasetSettings, source: Source) -> str | None:
    """The digest of the settings to ingest a source with; None where the dataset holds just that.

    Raises
    ------
    DatasetError
        It does not fit to what is there.
    SourceError
        The settings ask for a share of it that there cannot be.
    """
    image = image_spec(settings, source.pixel_shape)
    digest = existing.settings_digest(settings, source)
    if published is not None:
        if existing.holds(dataset, published, digest, source):
            return None
        existing.check_append(dataset, published, settings, source, image, digest)
    transform.check_shares(settings, source)
    return digest


def _write(
    spark: SparkSession,
    settings: DatasetSettings,
    dataset: str,
    source: Source,
    settings_digest: str,
    published: Manifest | None,
    claim: Claim,
) -> Manifest:
    """Write the shards of a source, and publish the version that has them."""
    executors.check_versions(spark)
    base = published if settings.append else None
    with existing.only_new(spark, source, settings.source, dataset, base) as (new, already_there):
        coming = Ingested(
            settings_digest=settings_digest, state=new.state, rows=sum(new.rows.values()), already_there=already_there
        )
        image = image_spec(settings, source.pixel_shape)
        layout = plan_layout(dataset, settings, new, image, settings_digest=settings_digest, base=base)
        try:
            files = transform.write_files(spark, new, settings, layout, base)
            most = settings.source.max_image_bytes
            added = _manifest_of(files, new.classes, settings.name, layout, coming, _application(spark), most)
            _check_bad_share(added, settings, dataset)
            _warn_of_versions(files, dataset)
            whole = added if base is None else manifest.next_version(base, added)
            _check_whole(whole, settings, dataset)
            claim.check()
            # Without a base, what is published at this place is the same dataset, damaged.
            whole = versions.publish(dataset, whole, before=base, replaced=None if base else published)
        except BaseException:
            existing.clean_up(dataset, layout.prefix, claim)
            raise
    existing.remove_leftovers(dataset, whole, claim)
    return whole


@contextmanager
def _spark_errors_as_one_line() -> Iterator[None]:
    try:
        yield
    except spark_failures() as error:
        raise IngestError(f"the Spark job failed: {spark_reason(error)}") from error


def _application(spark: SparkSession) -> str:
    return spark.conf.get("spark.app.id", None) or ""


def _manifest_of(
    files: list[WrittenShard | WrittenQuarantine],
    classes: tuple[str, ...],
    name: str,
    layout: Layout,
    coming: Ingested,
    application: str,
    max_bytes: int,
) -> Manifest:
    """The sealed manifest of what this job wrote."""
    shards = sorted((file for file in files if isinstance(file, WrittenShard)), key=lambda file: file.shard.path)
    aside = sorted((file for file in files if isinstance(file, WrittenQuarantine)), key=lambda file: file.path)
    set_aside: Counter[str] = Counter()
    for file in aside:
        set_aside.update(file.reasons)
    by_split = {split: [file for file in shards if file.split == split] for split in SPLITS}
    # Copies are counted from the originals, not from what was written: a lost one breaks the sum.
    copies = (layout.expand - 1) * sum(file.originals for file in by_split["train"])
    return manifest.seal(
        Manifest(
            name=name,
            settings_digest=coming.settings_digest,
            spark_application=application,
            image=listed_image(layout.image),
            preparation=preparation(layout.image, max_bytes),
            classes=classes,
            input_rows=coming.rows + copies,
            set_aside=dict(sorted(set_aside.items())),
            quarantine=tuple(file.path for file in aside),
            sources=(coming,),
            splits={split: _split_of(written, layout) for split, written in by_split.items() if written},
        )
    )


def _split_of(written: list[WrittenShard], layout: Layout) -> Split:
    return manifest.with_statistics(
        np.sum([file.label_counts for file in written], axis=0).tolist(),
        np.sum([file.pixel_sums for file in written], axis=0).tolist(),
        tuple(file.shard for file in written),
        layout.image.shape,
    )


def _check_bad_share(added: Manifest, settings: DatasetSettings, dataset: str) -> None:
    bad = Counter(added.set_aside)
    bad.pop(reasons.DUPLICATE, None)  # asked for, and nothing is wrong with them
    rows = sum(source.rows for source in added.sources)
    if bad.total() > settings.max_bad_share * rows:
        most = ", ".join(f"{reason} {count}" for reason, count in bad.most_common(3))
        raise DatasetError(
            f"{bad.total()} of {rows} rows cannot be used ({most}), more than dataset.max_bad_share "
            f"{settings.max_bad_share}: see {storage.join(dataset, QUARANTINE)} for each, mend the source or raise it"
        )


def _warn_of_versions(files: list[WrittenShard | WrittenQuarantine], dataset: str) -> None:
    """Executors that came after they were asked may differ all the same."""
    if text := executors.differing(file.writer for file in files if isinstance(file, WrittenShard)):
        log.warning("%s was written by several versions of pyarrow (%s): made again it may differ", dataset, text)


def _check_whole(whole: Manifest, settings: DatasetSettings, dataset: str) -> None:
    """There is something to train on, and the driver sees all that executors wrote."""
    if "train" not in whole.splits:
        raise DatasetError(f"no row of {settings.source.path or settings.source.kind} is left for the split `train`")
    if missing := existing.missing_shard(dataset, whole):
        raise DatasetError(
            f"an executor wrote {missing}, but the driver does not see it: "
            "set dataset.path to a place that the driver and all executors share"
        )
