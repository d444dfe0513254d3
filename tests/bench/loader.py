"""Shuffled loading of Fashion-MNIST, batch 256: our reader and its peers, same images, one process, warm file cache.

Each contender has the machine to itself: it is opened, makes one pass that is not counted, then some that are, and is
closed; all of that several times over. torch has one thread, as a training worker has.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from results import Result, compare, leave

from pipeline import storage
from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest, loader, petastorm_compat
from pipeline.data.manifest import Manifest
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import alone

BATCH, ROUNDS, PASSES = 256, 3, 8
TRAIN = TrainSettings(batch_size=BATCH, epochs=PASSES + 1)
OURS, STREAMED = "sparknorm", "sparknorm, shards read in every pass"
OURS_PETASTORM = "sparknorm, reader: petastorm"
PETASTORM = "Petastorm BatchedDataLoader, queue of 5,000"
PETASTORM_FASTEST = "Petastorm BatchedDataLoader, no queue"
TENSOR_DATASET = "torch DataLoader(TensorDataset)"
INDEXING, LIMIT = "torch tensor[indices]", "limit: torch.index_select"
ARROW = "pyarrow row groups, unshuffled"
# What a contender gives: batches without end, one pass after another.
Batches = Iterator[Any]


def run(dataset: str) -> None:
    """Measure every contender; print, plot and write the results."""
    torch.set_num_threads(1)
    found = load_manifest(dataset)
    contenders: dict[str, Callable[[ExitStack], Batches]] = {
        OURS: functools.partial(_ours, dataset, found, ReaderSettings()),
        STREAMED: functools.partial(_ours, dataset, found, ReaderSettings(memory_bytes=0)),
        OURS_PETASTORM: functools.partial(_ours, dataset, found, ReaderSettings(kind="petastorm")),
        PETASTORM: functools.partial(_petastorm, dataset, found, workers_count=2, queue=5_000, shuffle_rows=False),
        PETASTORM_FASTEST: functools.partial(_petastorm, dataset, found, workers_count=1, queue=0, shuffle_rows=True),
        ARROW: functools.partial(_arrow, dataset, found),
        TENSOR_DATASET: functools.partial(_tensor_dataset, dataset, found),
        INDEXING: functools.partial(_indexing, dataset, found),
        LIMIT: functools.partial(_limit, dataset, found),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    batches = found.split("train").rows // BATCH
    for _ in range(ROUNDS):
        for name, contender in contenders.items():
            speeds[name] += _measure(contender, batches)
    results = [Result(name, "images/s", passes) for name, passes in speeds.items()]
    ratios = [compare(results, OURS, other) for other in (PETASTORM, PETASTORM_FASTEST, TENSOR_DATASET, LIMIT)]
    ratios += [compare(results, STREAMED, other) for other in (PETASTORM, TENSOR_DATASET, LIMIT)]
    leave("loader", results + ratios, f"shuffled loading, {found.split('train').rows:,} images, batch {BATCH}")


def _measure(contender: Callable[[ExitStack], Batches], batches: int) -> list[float]:
    """Images per second of each pass but the first."""
    speeds = []
    with ExitStack() as stack:
        stream = contender(stack)
        for _ in range(PASSES):
            started = time.perf_counter()
            rows = sum(len(batch[1]) for batch in itertools.islice(stream, batches))
            speeds.append(rows / (time.perf_counter() - started))
            assert rows > 0.9 * batches * BATCH, f"{rows} rows are no whole pass"
    return speeds[1:]


def _ours(dataset: str, found: Manifest, settings: ReaderSettings, stack: ExitStack) -> Batches:
    source = stack.enter_context(closing(loader.TrainLoader(dataset, found, TRAIN, settings, alone("cpu"))))
    return stack.enter_context(source.batches(0))


def _petastorm(
    dataset: str, found: Manifest, stack: ExitStack, *, workers_count: int, queue: int, shuffle_rows: bool
) -> Batches:
    petastorm_compat.load()
    from petastorm.pytorch import BatchedDataLoader
    from petastorm.transform import TransformSpec, edit_field

    def to_uint8(rows: Any) -> Any:
        pixels = np.frombuffer(b"".join(rows["image"]), np.uint8)
        rows["image"] = list(pixels.reshape(len(rows), -1))
        return rows

    source = petastorm_compat.make_batch_reader(
        [f"file://{storage.absolute(storage.join(dataset, shard.path))}" for shard in found.split("train").shards],
        schema_fields=["label", "image"],
        transform_spec=TransformSpec(
            to_uint8,
            edit_fields=[edit_field("image", np.uint8, (int(np.prod(found.image.shape)),))],
            selected_fields=["image", "label"],
        ),
        reader_pool_type="thread",
        workers_count=workers_count,
        shuffle_row_groups=True,
        shuffle_rows=shuffle_rows,
        seed=1,
        num_epochs=None,
    )
    torch.manual_seed(1)
    loader = stack.enter_context(BatchedDataLoader(source, batch_size=BATCH, shuffling_queue_capacity=queue))
    return ((batch["image"].reshape(-1, *found.image.shape), batch["label"]) for batch in loader)


def _arrow(dataset: str, found: Manifest, stack: ExitStack) -> Batches:
    files = [pq.ParquetFile(storage.join(dataset, shard.path)) for shard in found.split("train").shards]
    for file in files:
        stack.callback(file.close)
    while True:
        for file in files:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=["label", "image"])
                pixels = np.frombuffer(table["image"].chunk(0).buffers()[2], np.uint8)
                images = torch.from_numpy(pixels.reshape(-1, *found.image.shape).copy())
                labels = torch.from_numpy(table["label"].to_numpy().astype(np.int64))
                # Batches do not cross row groups, so some are smaller: speed is counted in images.
                yield from zip(images.split(BATCH), labels.split(BATCH), strict=True)


def _in_memory(dataset: str, found: Manifest) -> tuple[torch.Tensor, torch.Tensor]:
    files = SplitFiles(dataset, found, "train")
    parts = [files.read(number) for number in range(len(files.group_rows))]
    images, labels = (torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))
    return images, labels


def _tensor_dataset(dataset: str, found: Manifest, stack: ExitStack) -> Batches:
    content = torch.utils.data.TensorDataset(*_in_memory(dataset, found))
    loader = torch.utils.data.DataLoader(content, batch_size=BATCH, shuffle=True, drop_last=True)
    while True:
        yield from loader


def _indexing(dataset: str, found: Manifest, stack: ExitStack) -> Batches:
    images, labels = _in_memory(dataset, found)
    while True:
        for rows in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            yield images[rows], labels[rows]


def _limit(dataset: str, found: Manifest, stack: ExitStack) -> Batches:
    images, labels = _in_memory(dataset, found)
    while True:
        for rows in torch.randperm(len(labels)).split(BATCH)[: len(labels) // BATCH]:
            yield torch.index_select(images, 0, rows), torch.index_select(labels, 0, rows)
