"""How a dataset is cut: shards of each split, rows of a row group, names of files. Arithmetic: no Spark, no files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pipeline.config.dataset import DatasetSettings, DeformSettings
from pipeline.config.settings import digest_of
from pipeline.data.manifest import QUARANTINE, SPLITS, Manifest
from pipeline.ingest.images import ImageSpec

if TYPE_CHECKING:
    from pipeline.ingest.sources.source import Form, Source

# Bytes of images that one record batch holds, about.
BATCH_BYTES = 16 << 20
_MOST_BATCH_ROWS = 10_000
# Bytes of an encoded image for each byte of pixels, about: only the number of shards hangs on it.
_ENCODED_SHARE = {"raw": 1.0, "png": 0.7, "jpeg": 0.25}
# A row group is the unit of reading. Smaller ones cost requests, larger ones memory and shuffling.
_ROW_GROUP_BYTES, _ROW_GROUP_ROWS, _FEWEST_ROW_GROUPS = 4 << 20, (32, 2_048), 64


@dataclass(frozen=True)
class Layout:
    """All that a task must know of the dataset it writes; plain values, since executors get it pickled.

    dataset : absolute path or URL
    prefix : what the name of every file of this job starts with
    splits : (name, shards) of each split; shards are numbered through all splits in this order, quarantine last
    form, pixel_shape : what payloads are (see `sources.source.Source`)
    expand : images that each training image becomes, itself and deformed copies
    seed : of the deformations
    """

    dataset: str
    prefix: str
    splits: tuple[tuple[str, int], ...]
    form: Form
    pixel_shape: tuple[int, int, int] | None
    image: ImageSpec
    num_classes: int
    row_group_rows: int
    compression: str
    expand: int
    deform: DeformSettings
    seed: int

    def file_of(self, shard: int) -> tuple[str, str]:
        """The split that a shard belongs to, and its file's path in the dataset up to the hash of its content."""
        number = shard
        for split, count in self.splits:
            if number < count:
                return split, f"{split}/{self.prefix}-{number:05d}"
            number -= count
        raise AssertionError(f"shard {shard} is past the last split")

    @property
    def batch_rows(self) -> int:
        """Rows of a record batch, so that its images take about `BATCH_BYTES`."""
        return max(1, min(_MOST_BATCH_ROWS, BATCH_BYTES // self.image.raw_bytes))


def plan_layout(
    dataset: str,
    settings: DatasetSettings,
    source: Source,
    image: ImageSpec,
    *,
    settings_digest: str,
    base: Manifest | None,
) -> Layout:
    """Cut the dataset that is coming, so that the same input and settings always give the same files.

    Parameters
    ----------
    settings_digest : see `existing.settings_digest`; names of files follow from it
    base : the version that is added to, if any
    """
    expected = _expected_rows(settings, source)
    stored_bytes = image.raw_bytes * _ENCODED_SHARE[image.encoding]
    splits = [
        (name, max(1, round(rows * stored_bytes / settings.shard_bytes))) for name, rows in expected.items() if rows
    ]
    train_rows = expected["train"] + (base.splits["train"].rows if base else 0)
    name = digest_of([settings_digest, base.digest if base else None])
    return Layout(
        dataset=dataset,
        prefix="part-" + name.removeprefix("sha256:")[:8],
        splits=(*splits, (QUARANTINE, 1)),
        form=source.form,
        pixel_shape=source.pixel_shape,
        image=image,
        num_classes=len(source.classes),
        row_group_rows=settings.row_group_rows or fitting_row_group_rows(image, train_rows),
        compression=settings.compression,
        expand=settings.source.expand,
        deform=settings.source.deform,
        seed=settings.seed,
    )


def fitting_row_group_rows(image: ImageSpec, train_rows: float) -> int:
    """Rows of a row group of about 4 MB, or fewer where a small dataset would have too few groups to shuffle."""
    fewest, most = _ROW_GROUP_ROWS
    by_bytes = max(fewest, min(most, _ROW_GROUP_BYTES // image.raw_bytes))
    return max(1, min(by_bytes, int(train_rows) // _FEWEST_ROW_GROUPS))


def _expected_rows(settings: DatasetSettings, source: Source) -> dict[str, float]:
    """Rows of each split, about."""
    if source.own_splits:
        rows: dict[str, float] = {name: source.rows.get(name, 0) for name in SPLITS}
    else:
        whole = source.rows[""]
        rows = {"train": whole * (1 - settings.test_share), "validation": 0, "test": whole * settings.test_share}
    if "validation" not in source.rows:
        share = settings.validation_share
        rows["validation"] = rows["train"] * (share if source.own_splits else share / (1 - settings.test_share))
        rows["train"] -= rows["validation"]
    rows["train"] *= settings.source.expand
    return rows
