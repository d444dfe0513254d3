"""The on-disk contract of a dataset. Pure Python: no Spark, no torch.

::

    <dataset>/manifest.json                 published last and atomically: without it there is no dataset
    <dataset>/{train,test,...}/*.parquet    columns: id (int64), label (int32), image (binary)
    <dataset>/quarantine/*.parquet          what was set aside: id, origin, reason

``image`` is uint8, C x H x W, row-major, every row of the one shape that the manifest states. Readers open only
the files the manifest lists, so what failed or speculative tasks left behind is never data.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pipeline import storage
from pipeline.config import digest_of

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
    """Rows of one split. ``mean`` and ``std`` are per channel, of pixel values scaled to [0, 1]."""

    rows: int
    label_counts: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shards: tuple[Shard, ...]


class Image(_Record):
    encoding: str
    shape: tuple[int, int, int]


class Manifest(_Record):
    """Everything a reader needs to know. ``digest`` covers all but itself and the Spark application's id."""

    format: int = FORMAT
    name: str
    digest: str = ""
    settings_digest: str
    spark_application: str
    image: Image
    classes: tuple[str, ...]
    input_rows: int
    set_aside: dict[str, int]
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
    content = manifest.model_dump(mode="json", exclude={"digest", "spark_application"})
    return manifest.model_copy(update={"digest": digest_of(content)})


def publish(dataset: str, manifest: Manifest) -> Manifest:
    """Make the dataset exist: write its sealed manifest, atomically. Returns the sealed manifest."""
    sealed = seal(manifest)
    text = json.dumps(sealed.model_dump(mode="json"), indent=1)
    storage.publish(storage.join(dataset, FILE_NAME), text.encode())
    return sealed


def load(dataset: str) -> Manifest:
    """Read and check a dataset's manifest.

    Raises
    ------
    DatasetError
        There is no manifest, it is of another format, or its digest does not match its content.
    """
    path = storage.join(dataset, FILE_NAME)
    try:
        tree: Any = json.loads(storage.read_bytes(path))
    except FileNotFoundError:
        raise DatasetError(f"{dataset}: no dataset here ({FILE_NAME} is missing); run `ingest` first") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise DatasetError(f"{path}: this version reads format {FORMAT}")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        raise DatasetError(f"{path} is damaged: {error}") from None
    if seal(manifest).digest != manifest.digest:
        raise DatasetError(f"{path} was altered: its content does not match its digest {manifest.digest}")
    return manifest
