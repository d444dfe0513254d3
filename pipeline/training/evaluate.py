"""Exact distributed evaluation: every row of a split counts once, whatever the number of ranks.

The forward pass goes through the bare model: DDP would broadcast buffers at every call, and ranks make different
numbers of calls here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import TrainSettings
from pipeline.data import reader
from pipeline.data.manifest import Manifest
from pipeline.data.prefetch import Prefetch
from pipeline.data.reader import Batch
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.weight_average import WeightAverage


@dataclass(frozen=True)
class Evaluation:
    """accuracy : share of rows whose largest logit is their label's; loss : mean cross-entropy in nats"""

    rows: int
    correct: int
    accuracy: float
    loss: float


@torch.inference_mode()
def evaluate(
    worker: Worker,
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    split_rows: int,
    channels_last: bool = False,
) -> Evaluation:
    """Accuracy and loss over all rows of a split.

    Parameters
    ----------
    model : the bare model, not its DDP wrapper; left in the mode it was in
    batches : this rank's share of the split, as `reader.evaluation_batches` gives it
    split_rows : rows of the split over all ranks

    Raises
    ------
    RuntimeError
        The ranks together did not see ``split_rows`` rows.
    """
    was_training = model.training
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    sums = torch.zeros(3, dtype=torch.float64, device=worker.device)
    for batch in batches:
        images = batch.images.to(worker.device, non_blocking=True).contiguous(memory_format=memory_format)
        labels = batch.labels.to(worker.device, non_blocking=True)
        logits = model.forward(images)  # not the compiled call: the last batch has another size
        logits = logits if logits.dtype == torch.float64 else logits.float()
        sums[0] += len(labels)
        sums[1] += (logits.argmax(dim=1) == labels).sum()
        sums[2] += nn.functional.cross_entropy(logits, labels, reduction="sum").double()
    model.train(was_training)
    with worker.status.waiting():
        rows, correct, loss = worker.all_reduce_sum(sums).tolist()
    if int(rows) != split_rows:
        raise RuntimeError(f"evaluation saw {int(rows)} rows of a split that has {split_rows}")
    return Evaluation(int(rows), int(correct), correct / rows, loss / rows)


class Evaluator:
    """Evaluates a network in the middle of its training, and leaves the training as it was.

    Judged are the weights, or their average where there is one, with norm statistics of all ranks together: running
    ones, or precise ones (``train.evaluation_statistics``; always for an average, whose activations no running
    statistic knows).

    Parameters
    ----------
    images : gives this rank's images of the training batches that precise statistics are computed over
    """

    def __init__(
        self,
        worker: Worker,
        model: nn.Module,
        average: WeightAverage | None,
        dataset: str,
        manifest: Manifest,
        train: TrainSettings,
        settings: ReaderSettings,
        images: Callable[[], Iterable[torch.Tensor]],
    ):
        self._worker, self._model, self._average, self._train = worker, model, average, train
        self._rows, self._images = manifest.split(train.evaluate_on).rows, images
        self._files = SplitFiles(dataset, manifest, train.evaluate_on, settings)
        self.precise = average is not None or train.evaluation_statistics == "precise"

    def run(self) -> tuple[Evaluation, dict[str, torch.Tensor]]:
        """Every rank calls it.

        Returns
        -------
        Evaluation
        dict
            What of the judged network's state differs from that of the network in training, by name.
        """
        worker, model = self._worker, self._model
        as_averaged = self._average.in_place_of_weights() if self._average else contextlib.nullcontext()
        with norm_statistics.kept(model), as_averaged:
            if self.precise:
                norm_statistics.precise(worker, model, self._getting_on(self._images()))
            else:
                norm_statistics.of_all_ranks(worker, model, self._train.global_batch // worker.world_size)
            result = self._evaluate()
            judged = {name: buffer.clone() for name, buffer in model.named_buffers()}
            if self._average:
                judged |= {name: weight.detach().clone() for name, weight in model.named_parameters()}
        return result, judged

    def _evaluate(self) -> Evaluation:
        batches = reader.evaluation_blocks(
            self._files,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            batch_size=self._train.evaluation_batch_size,
            pin=self._worker.device.type == "cuda",
        )
        with Prefetch(batches) as ready:
            return evaluate(
                self._worker,
                self._model,
                self._getting_on(ready),
                split_rows=self._rows,
                channels_last=self._train.channels_last,
            )

    def _getting_on(self, batches):
        """Each batch of an evaluation is progress."""
        for batch in batches:
            self._worker.status.enter("evaluation")
            yield batch

    def close(self) -> None:
        self._files.close()
