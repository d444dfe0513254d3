"""What the training loop asks of the data: how many steps an epoch has, and one rank's batches, from either reader."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import TrainSettings
from pipeline.data import plan, reader
from pipeline.data.manifest import DatasetError, Manifest
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import Worker


def check_data(manifest: Manifest, train: TrainSettings, settings: ReaderSettings, world_size: int) -> None:
    """Raise what a training with these settings would end with. Opens no shard and needs no process group.

    Raises
    ------
    ValueError
        The worker count does not divide the lanes, a split is missing, a batch is larger than the split, or there are
        too few row groups.
    """
    plan.rank_lanes(0, world_size, train.lanes)
    train = train.for_workers(world_size)
    for split in ("train", train.evaluate_on):
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


def plan_of(manifest: Manifest, train: TrainSettings, epoch: int) -> plan.EpochPlan:
    return plan.plan_epoch(
        np.array([rows for shard in manifest.split("train").shards for rows in shard.row_groups]),
        lanes=train.lanes,
        batch_size=train.global_batch,
        shuffle_row_groups=train.shuffle_row_groups,
        seed=train.seed,
        epoch=epoch,
    )


def steps_per_epoch(manifest: Manifest, train: TrainSettings, settings: ReaderSettings, world_size: int) -> int:
    """Global batches of an epoch, the same for every rank."""
    if settings.kind == "petastorm":
        from pipeline.data import petastorm_reader

        return petastorm_reader.steps_per_epoch(manifest, batch_size=train.global_batch, world_size=world_size)
    return plan_of(manifest, train, epoch=0).steps


class TrainingFeed:
    """One rank's batches of a whole training."""

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
        self.pin = worker.device.type == "cuda"

    @property
    def blocks_ahead(self) -> int:
        return 2 if self._settings.kind == "petastorm" else reader.blocks_ahead(self._files)

    def blocks(self, step: int) -> Iterator[reader.Block]:
        """The batches from a step of the training to its end, in blocks."""
        first_epoch, first_step = divmod(step, self.steps_per_epoch)
        if self._settings.kind == "petastorm":
            return self._petastorm(first_epoch, first_step)
        return reader.train_blocks(
            self._files,
            functools.lru_cache(maxsize=4)(functools.partial(plan_of, self._manifest, self._train)),
            self.lanes,
            epochs=self._train.epochs,
            first_epoch=first_epoch,
            first_step=first_step,
            pin=self.pin,
        )

    def _petastorm(self, first_epoch: int, first_step: int) -> Iterator[reader.Block]:
        from pipeline.data import petastorm_reader

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
                pin=self.pin,
            )
            yield from ([batch] for batch in batches)

    def close(self) -> None:
        self._files.close()
