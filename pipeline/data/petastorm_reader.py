"""The same training batches through Petastorm's ``make_batch_reader``: for those who have pipelines on it.

Petastorm shards by row group: rank r of W gets the row groups at the places r, r + W, ... of the order that it is
given. The order of an epoch is made here from (seed, epoch), in rounds of W row groups of nearly one size, one for
each rank. So every epoch deals the row groups anew, and every rank can make the same number of batches whatever the
deal. Unlike in `pipeline.data.reader`, the rows of a global batch depend on W, and a rank leaves out a part of its last
row group and of the last round.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch

from pipeline import storage
from pipeline.data import petastorm_compat
from pipeline.data.codec import decode_stored
from pipeline.data.manifest import DatasetError, Image, Manifest, RowGroup, Shard
from pipeline.data.reader import Batch
from pipeline.data.shards import check_file, label_without_class

Rows = tuple[np.ndarray, np.ndarray]  # uint8 images (rows, C, H, W) and int64 labels (rows,)
COLUMNS = ("label", "image")


class ShardCheck:
    """Compares each shard with the manifest when it is first opened, as `pipeline.data.shards.SplitFiles` does.

    Parameters
    ----------
    verify : whether SHA-256 is compared, not the size alone
    """

    def __init__(self, *, verify: bool):
        self._verify = verify
        self._checked: set[str] = set()

    def __call__(self, shard: Shard, file: BinaryIO) -> None:
        if shard.path not in self._checked:
            check_file(file, shard, verify=self._verify)
            self._checked.add(shard.path)


def steps_per_epoch(manifest: Manifest, *, batch_size: int, world_size: int) -> int:
    """Global batches of every epoch, the same for every rank: arithmetic, no file is opened.

    However the row groups are dealt (`deal_row_groups`), a rank's k-th largest row group has at least as many rows
    as the smallest of the k-th round when the largest are left over.

    Raises
    ------
    ValueError
        ``batch_size`` is not a multiple of ``world_size``, or a rank would get no row group or less than a batch.
    """
    if world_size < 1 or batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"train.batch_size {batch_size} is not a multiple of workers.count {world_size}: use "
            f"{max(1, batch_size // world_size) * world_size}"
        )
    group_rows = np.array([group.rows for group in _row_groups(manifest)], dtype=np.int64)
    rounds = len(group_rows) // world_size
    if rounds == 0:
        raise ValueError(
            f"{len(group_rows)} row groups are too few for {world_size} workers, which get whole row groups from "
            "Petastorm: lower workers.count, or ingest with a smaller dataset.row_group_rows"
        )
    rank_rows = int(np.sort(group_rows)[: rounds * world_size : world_size].sum())
    steps = rank_rows // (batch_size // world_size)
    if steps == 0:
        raise ValueError(
            f"{len(group_rows)} row groups for {world_size} workers leave one of them as few as {rank_rows} rows, "
            f"less than its {batch_size // world_size} rows of a batch: lower train.batch_size ({batch_size}) or "
            "workers.count, or ingest with a smaller dataset.row_group_rows"
        )
    return steps


def deal_row_groups(group_rows: np.ndarray, *, world_size: int, seed: int, epoch: int) -> np.ndarray:
    """Deal the row groups of one epoch to the ranks, each in the order it reads them.

    Parameters
    ----------
    group_rows : int array of shape (row groups,)

    Returns
    -------
    int64 array of shape (row groups // world_size, world_size). Row groups of one round are next to each other in
    size, so that ranks get alike numbers of rows; what is left over differs from epoch to epoch.
    """
    random = np.random.default_rng([seed, epoch])
    rounds = len(group_rows) // world_size
    dealt = random.permutation(len(group_rows))[: rounds * world_size]
    by_size = dealt[np.argsort(group_rows[dealt], kind="stable")].reshape(rounds, world_size)
    return random.permutation(random.permuted(by_size, axis=1))


def train_batches(
    dataset: str,
    manifest: Manifest,
    *,
    rank: int,
    world_size: int,
    batch_size: int,
    seed: int,
    epoch: int,
    first_step: int = 0,
    shuffle_row_groups: int = 4,
    pin: bool = False,
    check: ShardCheck | None = None,
) -> Iterator[Batch]:
    """One rank's batches of one epoch, each of ``batch_size // world_size`` rows.

    The same arguments give the same batches. The steps before ``first_step`` are read and left out.

    Parameters
    ----------
    batch_size : rows of a global batch
    shuffle_row_groups : rows are shuffled over windows of this many row groups
    check : what compares shards with the manifest before they are parsed, the same for all epochs; None: nothing does

    Raises
    ------
    ImportError
        Petastorm is not installed.
    ValueError
        See `steps_per_epoch`.
    DatasetError
        A shard is missing, cut, altered, or holds something else than the manifest says; the shard is named.
    """
    steps = steps_per_epoch(manifest, batch_size=batch_size, world_size=world_size)
    row_groups = _row_groups(manifest)
    group_rows = np.array([group.rows for group in row_groups], dtype=np.int64)
    dealt = deal_row_groups(group_rows, world_size=world_size, seed=seed, epoch=epoch)
    rows_read = _read(dataset, manifest, [row_groups[number] for number in dealt.ravel()], rank, world_size, check)
    windows = _shuffled_windows(rows_read, shuffle_row_groups, np.random.default_rng([seed, epoch, rank]))
    with closing(rows_read):
        for parts in itertools.islice(_slices(windows, batch_size // world_size), first_step, steps):
            images = torch.from_numpy(np.concatenate([window_images[rows] for window_images, _, rows in parts]))
            labels = torch.from_numpy(np.concatenate([window_labels[rows] for _, window_labels, rows in parts]))
            yield Batch(images.pin_memory(), labels.pin_memory()) if pin else Batch(images, labels)


def _row_groups(manifest: Manifest) -> list[RowGroup]:
    """All row groups of the training split that have rows, in the manifest's order."""
    return [group for group in manifest.split("train").row_groups if group.rows]


def _read(
    dataset: str, manifest: Manifest, dealt: list[RowGroup], rank: int, world_size: int, check: ShardCheck | None
) -> Generator[Rows, None, None]:
    """This rank's row groups of ``dealt``, in order. Petastorm is stopped when they end or the iterator is closed."""
    shards = {shard.path: number for number, shard in enumerate(manifest.split("train").shards)}
    group = RowGroup(manifest.split("train").shards[0], 0)  # Petastorm takes the schema from the first file
    try:
        # One thread: its results come in the order of the row groups, and it still reads ahead of the consumer.
        with petastorm_compat.make_batch_reader(
            [storage.join(dataset, path) for path in shards],
            row_groups=[(shards[shard.path], number) for shard, number in dealt],
            check=None if check is None else _named_check(check, dataset, manifest.split("train").shards),
            schema_fields=list(COLUMNS),
            reader_pool_type="thread",
            workers_count=1,
            shuffle_row_groups=False,
            cur_shard=rank,
            shard_count=world_size,
        ) as reader:
            if missing := sorted(set(COLUMNS) - set(reader.schema.fields)):
                raise pa.ArrowInvalid(f"has no column {', '.join(missing)} of a type that Petastorm reads")
            for group in dealt[rank::world_size]:
                yield _checked(next(reader, None), manifest, dataset, group)
    except (OSError, pa.ArrowException) as error:
        reason = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read: {error}"
        raise DatasetError(f"{group.named_in(dataset)}: {reason}") from error


def _named_check(check: ShardCheck, dataset: str, shards: tuple[Shard, ...]) -> Callable[[int, BinaryIO], None]:
    """The check of a shard by its number, whose error names the shard."""

    def named(number: int, file: BinaryIO) -> None:
        try:
            check(shards[number], file)
        except DatasetError as error:
            raise DatasetError(f"{storage.join(dataset, shards[number].path)}: {error}") from None

    return named


def _checked(batch: Any, manifest: Manifest, dataset: str, group: RowGroup) -> Rows:
    """The batch that Petastorm makes of a row group, as arrays; the batch is None where it has no rows there."""
    rows = 0 if batch is None else len(batch.label)
    if rows != group.rows:
        raise DatasetError(f"{group.named_in(dataset)}: has {rows} rows, the manifest says {group.rows}")
    try:
        return _images(batch.image, manifest.image), _labels(batch.label, len(manifest.classes))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{group.named_in(dataset)}: {error}") from error


def _images(payloads: np.ndarray, image: Image) -> np.ndarray:
    """An object array of bytes as uint8 (rows, C, H, W)."""
    if any(payload is None for payload in payloads):
        raise ValueError("an image is null")
    if image.encoding != "raw":
        return np.stack([decode_stored(payload, image.encoding, image.shape) for payload in payloads])
    size = math.prod(image.shape)
    if any(len(payload) != size for payload in payloads):
        raise ValueError(f"an image is not {size} bytes (shape {image.shape})")
    return np.frombuffer(b"".join(payloads), dtype=np.uint8).reshape(-1, *image.shape)


def _labels(labels: np.ndarray, num_classes: int) -> np.ndarray:
    # Petastorm turns integers with a null among them into floats.
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"a label is null or not an integer ({labels.dtype})")
    labels = labels.astype(np.int64)
    if (wrong := label_without_class(labels, num_classes)) is not None:
        raise ValueError(wrong)
    return labels


def _shuffled_windows(
    groups: Iterator[Rows], row_groups: int, random: np.random.Generator
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Images and labels of ``row_groups`` row groups at a time, and an order of their rows."""
    while window := list(itertools.islice(groups, row_groups)):
        images, labels = (np.concatenate(arrays) for arrays in zip(*window, strict=True))
        yield images, labels, random.permutation(len(labels))


def _slices(
    windows: Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]], rows: int
) -> Iterator[list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """Parts of windows that have ``rows`` rows together; a slice may go over the end of a window."""
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    wanted = rows
    for images, labels, order in windows:
        taken = 0
        while taken < len(order):
            part = order[taken : taken + wanted]
            parts.append((images, labels, part))
            taken += len(part)
            wanted -= len(part)
            if not wanted:
                yield parts
                parts, wanted = [], rows
