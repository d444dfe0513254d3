"""A split that is evaluated again and again, as one rank's batches; on a GPU they stay once they were read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import TrainSettings
from pipeline.data import reader
from pipeline.data.manifest import Manifest
from pipeline.data.prefetch import Prefetch
from pipeline.data.reader import Batch
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import Worker
from pipeline.training.network import memory_format


class EvaluationSplit:
    """One rank's share of a split, in batches of ``train.evaluation_batch_size`` on the rank's device.

    On CUDA a share of at most ``reader.gpu_bytes`` stays in GPU memory after the first pass, if twice as much is free
    then: evaluations between short
    epochs would else wait for the same images to be read, pinned and copied each time.

    Attributes
    ----------
    rows : of the split over all ranks

    Raises
    ------
    DatasetError
        While batches are taken: see `SplitFiles`.
    """

    def __init__(
        self,
        worker: Worker,
        dataset: str,
        manifest: Manifest,
        split: str,
        train: TrainSettings,
        settings: ReaderSettings,
    ):
        self._worker, self._train = worker, train
        self._files = SplitFiles(dataset, manifest, split, settings)
        self.rows = int(self._files.group_rows.sum())
        self._share = -(-self.rows // worker.world_size) * self._files.image_bytes
        self._may_stay = worker.device.type == "cuda" and self._share <= settings.gpu_bytes
        self._resident: list[Batch] | None = None

    @contextmanager
    def batches(self) -> Iterator[Iterator[Batch]]:
        """The batches on the device, images in the memory format of training; the last may be smaller."""
        if self._resident is not None:
            yield iter(self._resident)
            return
        blocks = reader.evaluation_blocks(
            self._files,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            batch_size=self._train.evaluation_batch_size,
            pin=self._worker.device.type == "cuda",
        )
        with Prefetch(blocks) as read:
            yield self._on_device(read)

    def _on_device(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        device, layout = self._worker.device, memory_format(self._train)
        # What training took until now it takes again, and some of it is given to these images: so much must be free.
        stays, passed = self._may_stay and 2 * self._share <= torch.cuda.mem_get_info(device)[0], []
        for images, labels, *_ in batches:
            there = images.to(device, non_blocking=True).contiguous(memory_format=layout)
            batch = Batch(there, labels.to(device, non_blocking=True))
            if stays:
                passed.append(batch)
            yield batch
        if stays:
            self._resident = passed

    def ids(self) -> np.ndarray:
        """Ids of the images in the order of `batches`: int64 (rows of this rank,)."""
        return reader.evaluation_ids(self._files, rank=self._worker.rank, world_size=self._worker.world_size)

    def close(self) -> None:
        self._files.close()
        self._resident = None
