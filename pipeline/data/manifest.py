"""The on-disk contract of a dataset. Pure Python: no Spark, no torch.

::

    <dataset>/manifest.json                 published last and atomically: without it there is no dataset
    <dataset>/manifest-000N.json            the manifest of an earlier version, to which something was appended
    <dataset>/{train,test,...}/*.parquet    columns: id (int64), label (int32), image (binary)
    <dataset>/quarantine/*.parquet          what was set aside: id, origin, reason

``image`` is uint8, C x H x W, row-major, every row of the one shape that the manifest states (``encoding: raw``), or
such an image as PNG or JPEG. Readers open only the files the manifest lists, so what failed or speculative tasks left
behind is never data.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.config.settings import digest_of

FORMAT = 1
FILE_NAME = "manifest.json"
SPLITS = ("train", "validation", "test")  # in the order people are shown them


class DatasetError(ValueError):
    """A dataset is missing, damaged, or not what its manifest says."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(_Record):
    """One Parquet file. ``path`` is relative to the dataset; ``row_groups`` are the rows of each row group."""

    path: str
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]


class Split(_Record):
    """Rows of one split. ``mean`` and ``std`` are per channel, of pixel values scaled to [0, 1].

    ``pixel_sums`` are what they follow from: per channel the sum of pixel values (0 to 255), and of their squares.
    """

    rows: int
    label_counts: tuple[int, ...]
    pixel_sums: tuple[tuple[int, ...], tuple[int, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[Shard, ...]


class Image(_Record):
    encoding: str
    shape: tuple[int, int, int]


class Ingested(_Record):
    """One source that went in: how many images it brought, and how many of its images were there already.

    ``state`` stands for the times of its files: the same content written again is another state.
    """

    settings_digest: str
    state: str
    rows: int
    already_there: int = 0


class Manifest(_Record):
    """Everything a reader needs to know.

    ``digest`` covers all but itself, the Spark application's id and times. ``input_rows`` counts the images of all
    sources and the deformed copies made of them. ``version`` counts what was appended; ``previous`` is the digest
    before it.
    """

    format: int = FORMAT
    name: str
    version: int = 1
    previous: str | None = None
    digest: str = ""
    settings_digest: str
    spark_application: str
    image: Image
    classes: tuple[str, ...]
    input_rows: int
    set_aside: dict[str, int]
    quarantine: tuple[str, ...] = ()
    sources: tuple[Ingested, ...]
    splits: dict[str, Split]

    def split(self, name: str) -> Split:
        """One split, or an error that lists those there are."""
        if name not in self.splits:
            raise DatasetError(f"dataset {self.name} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def seal(manifest: Manifest) -> Manifest:
    """Check conservation and give the manifest its digest.

    Raises
    ------
    DatasetError
        Rows in do not equal rows of all splits plus rows set aside, or a split disagrees with its shards.
    """
    for name, split in manifest.splits.items():
        in_shards = sum(shard.rows for shard in split.shards)
        in_groups = sum(sum(shard.row_groups) for shard in split.shards)
        if not split.rows == in_shards == in_groups == sum(split.label_counts):
            raise DatasetError(
                f"split {name}: {split.rows} rows, but its shards hold {in_shards}, their row groups "
                f"{in_groups}, and the label counts add up to {sum(split.label_counts)}"
            )
    kept = sum(split.rows for split in manifest.splits.values())
    aside = sum(manifest.set_aside.values())
    if manifest.input_rows != kept + aside:
        raise DatasetError(
            f"rows were lost or doubled: {manifest.input_rows} came in, {kept} are in splits and {aside} set aside"
        )
    content = manifest.model_dump(
        mode="json", exclude={"digest": True, "spark_application": True, "sources": {"__all__": {"state"}}}
    )
    return manifest.model_copy(update={"digest": digest_of(content)})


def with_statistics(
    label_counts: list[int], pixel_sums: list[list[int]], shards: tuple[Shard, ...], shape: tuple[int, int, int]
) -> Split:
    """A split with mean and deviation from its sums (see `Split`); images have the shape (C, H, W)."""
    rows = sum(shard.rows for shard in shards)
    pixels = rows * shape[1] * shape[2]
    means = [value / pixels for value in pixel_sums[0]]
    deviations = [math.sqrt(max(0.0, square / pixels - m * m)) for square, m in zip(pixel_sums[1], means, strict=True)]
    return Split(
        rows=rows,
        label_counts=tuple(label_counts),
        pixel_sums=(tuple(pixel_sums[0]), tuple(pixel_sums[1])),
        mean=tuple(value / 255 for value in means),
        std=tuple(value / 255 for value in deviations),
        shards=shards,
    )


def joined(before: Manifest, added: Manifest) -> Manifest:
    """The next version: all shards of the one before, and those that were added."""
    splits = {}
    for name in SPLITS:
        parts = [made.splits[name] for made in (before, added) if name in made.splits]
        if parts:
            splits[name] = with_statistics(
                [sum(counts) for counts in zip(*(part.label_counts for part in parts), strict=True)],
                [[sum(c) for c in zip(*(part.pixel_sums[power] for part in parts), strict=True)] for power in (0, 1)],
                tuple(shard for part in parts for shard in part.shards),
                before.image.shape,
            )
    return added.model_copy(
        update={
            "name": before.name,
            "version": before.version + 1,
            "previous": before.digest,
            "input_rows": before.input_rows + added.input_rows,
            "set_aside": dict(sorted((Counter(before.set_aside) + Counter(added.set_aside)).items())),
            "quarantine": before.quarantine + added.quarantine,
            "sources": before.sources + added.sources,
            "splits": splits,
        }
    )


def publish(dataset: str, manifest: Manifest, *, before: Manifest | None = None) -> Manifest:
    """Make the dataset, or its new version, exist: write its sealed manifest, atomically. Returns the sealed manifest.

    Parameters
    ----------
    before : the version that this one adds to; it stays readable under its own name
    """
    sealed = seal(manifest)
    if before is not None:
        storage.publish(storage.join(dataset, file_name(before.version)), _text(before))
    storage.publish(storage.join(dataset, FILE_NAME), _text(sealed))
    return sealed


def _text(manifest: Manifest) -> bytes:
    return json.dumps(manifest.model_dump(mode="json"), indent=1).encode()


def file_name(version: int) -> str:
    """Where an earlier version's manifest lies in the dataset."""
    return f"manifest-{version:04d}.json"


def load(dataset: str, version: int | None = None) -> Manifest:
    """Read and check a dataset's manifest, the newest or that of a version.

    Raises
    ------
    DatasetError
        There is no manifest or no such version, it is of another format, or its digest does not match its content.
    """
    newest = _load(dataset, FILE_NAME)
    if version is None or version == newest.version:
        return newest
    if not 1 <= version <= newest.version:
        raise DatasetError(f"{dataset} has versions 1 to {newest.version}; dataset.version is {version}")
    if not storage.exists(storage.join(dataset, file_name(version))):
        raise DatasetError(f"{dataset}: version {version} cannot be read, {file_name(version)} is missing")
    return _load(dataset, file_name(version))


def _load(dataset: str, name: str) -> Manifest:
    path = storage.join(dataset, name)
    try:
        tree: Any = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise DatasetError(f"{dataset}: no dataset here ({name} is missing); run `ingest` first") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise DatasetError(f"{path}: this version reads format {FORMAT}")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise DatasetError(
            f"{path} is damaged, or was written by an older sparknorm: {where}: {first['msg']}"
        ) from None
    try:
        digest = seal(manifest).digest
    except DatasetError as error:
        raise DatasetError(f"{path} was altered: {error}") from None
    if digest != manifest.digest:
        raise DatasetError(f"{path} was altered: its content does not match its digest {manifest.digest}")
    return manifest
