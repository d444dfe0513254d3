"""The on-disk contract of a dataset. Pure Python: no Spark, no torch.

::

    <dataset>/manifest-000N.json                   of version N, published atomically: without one there is no dataset
    <dataset>/manifest.json                        the same as the newest of them (`versions`)
    <dataset>/{train,validation,test}/*.parquet    columns: id (int64), label (int32), image (binary)
    <dataset>/quarantine/*.parquet                 what was set aside: id, origin, reason

``image`` is uint8, C x H x W, row-major, every row of the one shape that the manifest states (``encoding: raw``), or
such an image as PNG or JPEG. Readers open only the files the manifest lists, so what failed or speculative tasks left
behind is never data.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NamedTuple, overload

from pydantic import SerializerFunctionWrapHandler, model_serializer

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.config.settings import digest_of

FORMAT = 1
SPLITS = ("train", "validation", "test")  # in the order people are shown them
QUARANTINE = "quarantine"
_NOT_IN_DIGEST: Any = {
    "digest": True,
    "spark_application": True,
    "preparation": True,
    "sources": {"__all__": {"state"}},
}


class DatasetError(ValueError):
    """A dataset is missing, damaged, or not what its manifest says."""


class Shard(FrozenModel):
    """One Parquet file of a split.

    path : relative to the dataset
    bytes, sha256 : the file's size, and the SHA-256 of its content as hexadecimal digits
    row_groups : rows of each row group, in the file's order
    """

    path: str
    rows: int
    bytes: int
    sha256: str
    row_groups: tuple[int, ...]


class RowGroup(NamedTuple):
    """One row group of a split: its shard, and its number inside that file."""

    shard: Shard
    number: int

    @property
    def rows(self) -> int:
        return self.shard.row_groups[self.number]

    def named_in(self, dataset: str) -> str:
        """How an error about this row group of a dataset names it."""
        return f"{storage.join(dataset, self.shard.path)}, row group {self.number}"


class RowGroups(Sequence[RowGroup]):
    """The row groups of some shards, one after the other, each made when it is asked for: a split may have millions."""

    def __init__(self, shards: Sequence[Shard]):
        self._shards = shards
        self._ends = list(itertools.accumulate(len(shard.row_groups) for shard in shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, number: int) -> RowGroup: ...
    @overload
    def __getitem__(self, number: slice) -> list[RowGroup]: ...
    def __getitem__(self, number: int | slice) -> RowGroup | list[RowGroup]:
        if isinstance(number, slice):
            return [self[each] for each in range(len(self))[number]]
        number = range(len(self))[number]  # raises IndexError, and counts from the end where it is negative
        index = bisect.bisect_right(self._ends, number)
        return RowGroup(self._shards[index], number - (self._ends[index - 1] if index else 0))

    def __iter__(self) -> Iterator[RowGroup]:
        return (RowGroup(shard, number) for shard in self._shards for number in range(len(shard.row_groups)))


class Split(FrozenModel):
    """The rows of one split.

    label_counts : rows of each class, in the order of `Manifest.classes`
    pixel_sums : per channel the sum of all pixel values (0 to 255), and the sum of their squares
    mean, std : per channel, of pixel values scaled to [0, 1]; they follow from the sums
    """

    rows: int
    label_counts: tuple[int, ...]
    pixel_sums: tuple[tuple[int, ...], tuple[int, ...]]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[Shard, ...]

    @property
    def row_groups(self) -> RowGroups:
        """All row groups, shard after shard: a row group's number in the split is its index here."""
        return RowGroups(self.shards)

    @property
    def group_rows(self) -> list[int]:
        """The rows of each row group, in the order of `row_groups`."""
        return [rows for shard in self.shards for rows in shard.row_groups]


class Image(FrozenModel):
    """How shards hold images, and how they were made.

    encoding : raw, png or jpeg
    shape : (C, H, W)
    decode, decode_margin, keep_jpeg : the settings ``dataset.image`` of these names. They are written, and part of a
        digest, only where they are not as in versions without them: exact and False.
    """

    encoding: str
    shape: tuple[int, int, int]
    decode: str = "exact"
    decode_margin: float | None = None
    keep_jpeg: bool = False

    @model_serializer(mode="wrap")
    def _without_what_is_as_before(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        before = {"decode": "exact", "decode_margin": None, "keep_jpeg": False}
        return {name: value for name, value in serialize(self).items() if name not in before or value != before[name]}


class Preparation(FrozenModel):
    """How the images of a dataset were made from what its source had (`pipeline.ingest.images.ImageSpec`): whoever
    shows a network new images must make them alike.

    max_bytes : a file of more was set aside unread
    """

    resize: Literal["none", "crop", "letterbox"]
    background: int
    max_pixels: int
    jpeg_quality: int
    formats: tuple[str, ...]
    max_bytes: int


class Ingested(FrozenModel):
    """One source that went in: how many images it brought, and how many of its images were there already.

    ``state`` stands for the times of its files: the same content written again is another state.
    """

    settings_digest: str
    state: str
    rows: int
    already_there: int = 0


class Manifest(FrozenModel):
    """Everything a reader needs to know.

    ``digest`` covers all but itself, the Spark application's id, times and ``preparation``, which earlier versions did
    not write, and ``settings_digest`` covers. ``input_rows`` counts the images of all sources and the deformed copies
    made of them. ``version`` counts what was appended; ``previous`` is the digest before it.
    """

    format: int = FORMAT
    name: str
    version: int = 1
    previous: str | None = None
    digest: str = ""
    settings_digest: str
    spark_application: str
    image: Image
    preparation: Preparation | None = None
    classes: tuple[str, ...]
    input_rows: int
    set_aside: dict[str, int]
    quarantine: tuple[str, ...] = ()
    sources: tuple[Ingested, ...]
    splits: dict[str, Split]

    @property
    def shards(self) -> list[Shard]:
        """The shards of all splits."""
        return [shard for split in self.splits.values() for shard in split.shards]

    def split(self, name: str) -> Split:
        """One split by its name.

        Raises
        ------
        DatasetError
            The dataset has no such split; the message lists those it has.
        """
        if name not in self.splits:
            raise DatasetError(f"dataset {self.name} has no split {name!r}; it has {', '.join(sorted(self.splits))}")
        return self.splits[name]


def seal(manifest: Manifest) -> Manifest:
    """Check that no row was lost or doubled, and give the manifest its digest.

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
    content = manifest.model_dump(mode="json", exclude=_NOT_IN_DIGEST)
    return manifest.model_copy(update={"digest": digest_of(content)})


def with_statistics(
    label_counts: list[int], pixel_sums: list[list[int]], shards: tuple[Shard, ...], shape: tuple[int, int, int]
) -> Split:
    """A split with the mean and deviation that follow from its sums.

    Parameters
    ----------
    label_counts, pixel_sums : as in `Split`
    shape : (C, H, W) of every image
    """
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


def next_version(before: Manifest, added: Manifest) -> Manifest:
    """The manifest of the version after ``before``: its shards, and those that were added. It is not sealed yet."""
    splits = {}
    for name in SPLITS:
        parts = [manifest.splits[name] for manifest in (before, added) if name in manifest.splits]
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
