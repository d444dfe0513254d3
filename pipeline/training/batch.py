"""The batches of one rank as its network takes them: on the device, augmented, in parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.config.training import TrainSettings
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import Manifest
from pipeline.data.reader import Batch
from pipeline.distributed.worker import Worker
from pipeline.training.augment import augment
from pipeline.training.network import memory_format

# Images and labels of a part of a batch.
Part = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DeviceBatches:
    """Turns batches of one rank into what its network takes.

    loader : of this rank; it knows the rank's lanes and the steps of an epoch
    train : with the global batch of the whole training
    """

    worker: Worker
    loader: TrainLoader
    manifest: Manifest
    train: TrainSettings

    def parts(self, batch: Batch, step: int) -> list[Part]:
        """A batch on the device, augmented as step number ``step`` does, in ``train.accumulate`` parts of one size."""
        device = self.worker.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        images = augment(
            images,
            self.train.augment,
            seed=self.train.seed,
            step=step,
            lanes=self.loader.lanes,
            num_lanes=self.train.lanes,
            mean=self.manifest.split("train").mean,
        ).contiguous(memory_format=memory_format(self.train))
        count = self.train.accumulate
        return list(zip(images.chunk(count), labels.chunk(count), strict=True))

    def first_images(self, step: int) -> Iterator[torch.Tensor]:
        """The images of the first ``train.precise_batches`` batches of the epoch that ``step`` steps ended in.

        They come in parts, augmented as they were when the network was trained on them.
        """
        steps_per_epoch = self.loader.steps_per_epoch
        first = max(0, step - 1) // steps_per_epoch * steps_per_epoch
        count = min(self.train.precise_batches, steps_per_epoch)
        with self.loader.batches(first) as batches:
            for number, batch in enumerate(itertools.islice(batches, count), first):
                yield from (images for images, _ in self.parts(batch, number))

    def blank(self) -> Part:
        """Black images as many as a part has, in the same layout, all of the first class."""
        rows = self.train.global_batch // self.worker.world_size // self.train.accumulate
        images = torch.zeros(rows, *self.manifest.image.shape, dtype=torch.uint8, device=self.worker.device)
        labels = torch.zeros(rows, dtype=torch.int64, device=self.worker.device)
        return images.contiguous(memory_format=memory_format(self.train)), labels
