"""The training loop's view of the data: how many steps an epoch has, and one rank's batches, from either reader."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np

from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import TrainSettings
from pipeline.data import plan, reader
from pipeline.data.manifest import DatasetError, Manifest
from pipeline.data.prefetch import Prefetch
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import Worker


def check_data(manifest: Manifest, train: TrainSettings, settings: ReaderSettings, world_size: int) -> None:
    """Check that a training with these settings can be fed. No shard is opened, and no process group is needed.

    Parameters
    ----------
    world_size : number of workers

    Raises
    ------
    ValueError
        The worker count does not divide the lanes, a split is missing, a batch is larger than the split, or there are
        too few row groups; balanced sampling is asked of Petastorm, which knows no lanes; or images cannot be changed
        as ``train.augment`` says.
    """
    if train.sampling == "balanced" and settings.kind == "petastorm":
        raise ValueError(
            "train.sampling balanced needs reader.kind arrow: Petastorm deals whole row groups, and repeats no rows"
        )
    plan.rank_lanes(0, world_size, train.lanes)
    train = train.for_workers(world_size)
    train.augment.check(
        image_shape=manifest.image.shape, lane_rows=train.global_batch // train.lanes, reader=settings.kind
    )
    selecting = (train.select_on,) if train.final_network != "last" else ()
    for split in ("train", train.evaluate_on, *selecting):
        if not manifest.split(split).rows:
            raise DatasetError(f"dataset {manifest.name}: split {split!r} has no rows")
    first = plan_of(manifest, train, epoch=0)
    if len(first.group_rows) < train.lanes:
        raise DatasetError(
            f"dataset {manifest.name}: split 'train' has {len(first.group_rows)} row groups, fewer than train.lanes "
            f"{train.lanes}: ingest it with dataset.row_group_rows of at most {max(1, first.lane_rows)}, "
            "or train with fewer lanes"
        )
    steps_per_epoch(manifest, train, settings, world_size)


def plan_of(manifest: Manifest, train: TrainSettings, epoch: int, labels: np.ndarray | None = None) -> plan.EpochPlan:
    """The plan of one epoch of the training split; with its labels, int (rows,), one in which classes are balanced."""
    copies = None if labels is None else plan.balanced_copies(labels, seed=train.seed, epoch=epoch)
    return plan.plan_epoch(
        np.array(manifest.split("train").group_rows),
        lanes=train.lanes,
        batch_size=train.global_batch,
        shuffle_row_groups=train.shuffle_row_groups,
        seed=train.seed,
        epoch=epoch,
        copies=copies,
    )


def train_labels(dataset: str, manifest: Manifest, settings: ReaderSettings) -> np.ndarray:
    """The labels of the training split in the manifest's order: int32 (rows,).

    Only the column of labels is read; whole files get their SHA-256 when their images are.

    Raises
    ------
    DatasetError
        A shard cannot be read, or its classes have other numbers of rows than the manifest says.
    """
    split = manifest.split("train")
    unverified = settings.model_copy(update={"verify": "off"})
    with (
        closing(SplitFiles(dataset, manifest, "train", unverified)) as files,
        ThreadPoolExecutor(settings.threads) as executor,
    ):

        def read(number: int) -> np.ndarray:
            return files.read_labels(number, 0, int(files.group_rows[number])).astype(np.int32)

        labels = np.concatenate(list(executor.map(read, range(len(files.group_rows)))))
    counts = np.bincount(labels[labels >= 0], minlength=len(split.label_counts)).tolist()
    if tuple(counts) != split.label_counts:
        raise DatasetError(
            f"dataset {manifest.name}: the labels of split 'train' count {counts}, the manifest says "
            f"{list(split.label_counts)}"
        )
    return labels


def steps_per_epoch(manifest: Manifest, train: TrainSettings, settings: ReaderSettings, world_size: int) -> int:
    """Global batches of an epoch, the same for every rank."""
    if settings.kind == "petastorm":
        from pipeline.data import petastorm_reader

        return petastorm_reader.steps_per_epoch(manifest, batch_size=train.global_batch, world_size=world_size)
    return plan_of(manifest, train, epoch=0).steps


class TrainLoader:
    """One rank's batches of a whole training.

    Parameters
    ----------
    dataset : folder or fsspec URL of the dataset
    worker : its rank, the number of workers, and its device: for CUDA, batches lie in pinned memory

    Attributes
    ----------
    lanes : the lanes of this rank
    steps_per_epoch : global batches of an epoch, the same for every rank

    Raises
    ------
    ValueError
        See `check_data`.
    """

    def __init__(
        self, dataset: str, manifest: Manifest, train: TrainSettings, settings: ReaderSettings, worker: Worker
    ):
        check_data(manifest, train, settings, worker.world_size)
        train = train.for_workers(worker.world_size)
        self._dataset, self._manifest, self._train = dataset, manifest, train
        self._settings, self._worker = settings, worker
        self._files = SplitFiles(dataset, manifest, "train", settings)
        self.lanes = plan.rank_lanes(worker.rank, worker.world_size, train.lanes)
        self.steps_per_epoch = steps_per_epoch(manifest, train, settings, worker.world_size)
        self._pin = worker.device.type == "cuda"
        self._labels = train_labels(dataset, manifest, settings) if train.sampling == "balanced" else None

    def batches(self, step: int) -> Prefetch[reader.Batch]:
        """The batches from a step of the training to its end: a context manager that gives their iterator.

        Where it pays, a background thread makes them ahead; it ends with the ``with`` block.
        """
        petastorm = self._settings.kind == "petastorm"
        # A GPU computes while the host gathers and pins: those must not be in its way.
        ahead = 2 if petastorm or self._pin else reader.blocks_ahead(self._files)
        return Prefetch(self._blocks(step), ahead)

    def _blocks(self, step: int) -> Iterator[reader.Block]:
        first_epoch, first_step = divmod(step, self.steps_per_epoch)
        if self._settings.kind == "petastorm":
            return self._petastorm(first_epoch, first_step)
        return reader.train_blocks(
            self._files,
            functools.lru_cache(maxsize=4)(
                functools.partial(plan_of, self._manifest, self._train, labels=self._labels)
            ),
            self.lanes,
            epochs=self._train.epochs,
            first_epoch=first_epoch,
            first_step=first_step,
            pin=self._pin,
            ids=self._train.augment.flip == "alternating",
        )

    def _petastorm(self, first_epoch: int, first_step: int) -> Iterator[reader.Block]:
        from pipeline.data import petastorm_reader

        check = petastorm_reader.ShardCheck(verify=self._settings.verify == "shard")
        for epoch in range(first_epoch, self._train.epochs):
            batches = petastorm_reader.train_batches(
                self._dataset,
                self._manifest,
                rank=self._worker.rank,
                world_size=self._worker.world_size,
                batch_size=self._train.global_batch,
                seed=self._train.seed,
                epoch=epoch,
                first_step=first_step if epoch == first_epoch else 0,
                shuffle_row_groups=self._train.shuffle_row_groups,
                pin=self._pin,
                check=check,
            )
            yield from ([batch] for batch in batches)

    def close(self) -> None:
        """Close the shards."""
        self._files.close()
