"""The batches of one rank as its network takes them: on the device, augmented, in parts."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.config.training import TrainSettings
from pipeline.data.loader import TrainLoader
from pipeline.data.manifest import Manifest
from pipeline.data.reader import Batch
from pipeline.distributed.worker import Worker
from pipeline.training.augment import augment, mix
from pipeline.training.augment.draws import BatchRows
from pipeline.training.network import memory_format

# Images and labels of a part of a batch: int64 (rows,), or where images are mixed float32 (rows, classes), the share of
# each class.
Part = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class DeviceBatches:
    """Turns batches of one rank into what its network takes.

    loader : of this rank; it knows the rank's lanes and the steps of an epoch
    train : with the global batch of the whole training
    input_shape : (C, H, W) of the images that the network takes; None: as they are stored
    mean : of each channel, in [0, 1], that the network subtracts; None: of the training split
    """

    worker: Worker
    loader: TrainLoader
    manifest: Manifest
    train: TrainSettings
    input_shape: tuple[int, int, int] | None = None
    mean: Sequence[float] | None = None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the network is given: as they are stored, or random crops of its own size."""
        cropped = self.train.augment.crop_scale is not None
        return self.input_shape if cropped and self.input_shape else self.manifest.image.shape

    def ahead(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches. Those for a GPU lie on it: while it computes on one, the next is copied.

        A stream of its own copies, so that a step waits for no copy but the first; 38 MB of photographs take as long
        as 2% of a step of ResNet-50. Nothing waits on the host.
        """
        if self.worker.device.type != "cuda":
            yield from batches
            return
        stream = torch.cuda.Stream(self.worker.device)
        coming = None
        for batch in batches:
            there, coming = coming, self._copied(batch, stream)
            if there:
                yield _arrived(*there)
        if coming:
            yield _arrived(*coming)

    def _copied(self, batch: Batch, stream: torch.cuda.Stream) -> tuple[Batch, torch.cuda.Event]:
        """A batch on the device, and what its copy records at its end. The host's memory is pinned."""
        device = self.worker.device
        with torch.cuda.stream(stream):
            images, labels = (part.to(device, non_blocking=True) for part in (batch.images, batch.labels))
            return batch._replace(images=images, labels=labels), stream.record_event()

    def parts(self, batch: Batch, step: int) -> list[Part]:
        """A batch on the device, augmented as step number ``step`` does, in ``train.accumulate`` parts.

        They have one size, but where fewer workers than `workers.count` train on: the last may then have fewer rows.
        """
        device = self.worker.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        train, lanes = self.train, self.loader.lanes
        images = augment(
            images,
            train.augment,
            seed=train.seed,
            step=step,
            lanes=lanes,
            num_lanes=train.lanes,
            mean=self.mean or self.manifest.split("train").mean,
            size=self.image_shape[1:],
            epoch=step // self.loader.steps_per_epoch,
            ids=batch.ids,
        )
        if train.augment.mixes:
            rows = BatchRows(train.seed, step, lanes, train.lanes, len(images) // len(lanes))
            images, labels = mix(images, labels, train.augment, rows, classes=len(self.manifest.classes))
        images = images.contiguous(memory_format=memory_format(train))
        count = train.accumulate
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
        """Black images as many as a part has, in the same size and layout, all of the first class."""
        rows = self.train.global_batch // self.worker.world_size // self.train.accumulate
        images = torch.zeros(rows, *self.image_shape, dtype=torch.uint8, device=self.worker.device)
        labels = torch.zeros(rows, dtype=torch.int64, device=self.worker.device)
        if self.train.augment.mixes:
            classes = torch.arange(len(self.manifest.classes), device=self.worker.device)
            labels = (labels[:, None] == classes).float()
        return images.contiguous(memory_format=memory_format(self.train)), labels


def _arrived(batch: Batch, copied: torch.cuda.Event) -> Batch:
    """The batch, for what is launched from now on: that waits for the copy, and the memory is free after it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied)
    for part in (batch.images, batch.labels):
        part.record_stream(stream)
    return batch
