"""Exact distributed evaluation: every row of a split counts once, whatever the number of ranks.

The forward pass goes through the bare model: DDP would broadcast buffers at every call, and ranks make different
numbers of calls here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import nn

from pipeline.config.dataset import ReaderSettings
from pipeline.data import reader
from pipeline.data.prefetch import Prefetch
from pipeline.data.reader import Batch
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.batch import DeviceBatches
from pipeline.training.checkpoint_writer import on_cpu
from pipeline.training.image_scores import PredictionCollector, image_scores
from pipeline.training.metrics import Evaluation, EvaluationCounts
from pipeline.training.predictions import Predictions
from pipeline.training.progress import TrainingState
from pipeline.training.selection import SelectedNetwork, score_on

T = TypeVar("T")


@torch.inference_mode()
def evaluate(
    worker: Worker,
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    classes: int,
    split_rows: int,
    channels_last: bool = False,
    collector: PredictionCollector | None = None,
) -> Evaluation:
    """The scores of a network over all rows of a split.

    Parameters
    ----------
    model : the bare model, not its DDP wrapper; left in the mode it was in
    batches : this rank's share of the split, as `reader.evaluation_blocks` gives it
    classes : how many the dataset has, as many as the network has logits
    split_rows : rows of the split over all ranks
    collector : gets the scores of each image

    Raises
    ------
    RuntimeError
        The ranks together did not see ``split_rows`` rows.
    """
    was_training = model.training
    model.eval()
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    counts = EvaluationCounts(classes, worker.device)
    for batch in batches:
        images = batch.images.to(worker.device, non_blocking=True).contiguous(memory_format=memory_format)
        labels = batch.labels.to(worker.device, non_blocking=True)
        logits = model.forward(images)  # not the compiled call: the last batch has another size
        logits = logits if logits.dtype == torch.float64 else logits.float()
        scores = image_scores(logits, labels)
        counts.update(labels, scores)
        if collector is not None:
            collector.add(labels, scores)
    model.train(was_training)
    with worker.status.waiting():
        return counts.sum_over(worker, split_rows)


class EvaluatedNetwork(NamedTuple):
    """What an evaluation in the middle or at the end of a training has found.

    state : the tensors, by name, in which the network that was evaluated differs from the one in training
    predictions : of each image, on rank 0 where they were asked for; else None
    selection : scores on ``train.select_on``, where that chooses the network that the training ends with
    """

    evaluation: Evaluation
    state: dict[str, torch.Tensor]
    predictions: Predictions | None
    selection: dict[str, float | None] | None = None


class Evaluator:
    """Evaluates a network in the middle of its training, and leaves the training as it was.

    It evaluates the weights, or their average where there is one, with norm statistics of all ranks together: running
    ones, or precise ones (``train.evaluation_statistics``; always for an average, whose activations no running
    statistic knows).

    Parameters
    ----------
    data : gives the training images that precise statistics are computed over
    dataset : folder of the dataset
    """

    def __init__(self, state: TrainingState, data: DeviceBatches, dataset: str, settings: ReaderSettings):
        self._state, self._data, self._worker, self._train = state, data, data.worker, data.train
        self._files = SplitFiles(dataset, data.manifest, data.train.evaluate_on, settings)
        self._selection: SplitFiles | None = None
        if data.train.final_network != "last":
            self._selection = SplitFiles(dataset, data.manifest, data.train.select_on, settings)
        self._steps_per_epoch, parts = data.loader.steps_per_epoch, data.train.evaluations_per_epoch
        self._due = {self._steps_per_epoch * part // parts for part in range(1, parts + 1)}
        self.precise = state.average is not None or data.train.evaluation_statistics == "precise"

    def is_due(self, step: int) -> bool:
        """Whether to evaluate after this many steps: at equal distances within an epoch, and at its end."""
        return (step - 1) % self._steps_per_epoch + 1 in self._due

    def run(self, *, collect: bool = False) -> EvaluatedNetwork:
        """Evaluate what the training has reached. Every rank calls it.

        Parameters
        ----------
        collect : whether the predictions of all images come with it
        """
        worker, model, average = self._worker, self._state.model, self._state.average
        collector = PredictionCollector(worker.device) if collect else None
        as_averaged = average.in_place_of_weights() if average else contextlib.nullcontext()
        with norm_statistics.preserve_buffers(model), as_averaged:
            if self.precise:
                images = self._data.first_images(self._state.progress.step)
                norm_statistics.precise(worker, model, self._with_signs_of_life(images))
            else:
                norm_statistics.of_all_ranks(worker, model, self._train.global_batch // worker.world_size)
            evaluation = self.measure(collector)
            selection = self._select(self._selection) if self._selection else None
            evaluated_state = {name: buffer.clone() for name, buffer in model.named_buffers()}
            if average:
                evaluated_state |= {name: weight.detach().clone() for name, weight in model.named_parameters()}
        predictions = collector.gather(worker, self._ids()) if collector is not None else None
        return EvaluatedNetwork(evaluation, evaluated_state, predictions, selection)

    def run_selected(self, selected: SelectedNetwork) -> EvaluatedNetwork:
        """Evaluate a network that was kept, and leave it in the place of the one in training. Every rank calls it."""
        worker, model = self._worker, self._state.model
        model.load_state_dict(selected.tensors)
        collector = PredictionCollector(worker.device)
        evaluation = self.measure(collector)
        return EvaluatedNetwork(evaluation, dict(selected.tensors), collector.gather(worker, self._ids()))

    def measure(self, collector: PredictionCollector | None = None) -> Evaluation:
        """The scores of the network as it is, over the split that judges. Every rank calls it."""
        return self._measure(self._files, collector)

    def _select(self, files: SplitFiles) -> dict[str, float | None]:
        """Measure the network as it is on the split that chooses, and keep it if none before was as good."""
        state, found = self._state, self._measure(files)
        score = score_on(found, self._train)
        if math.isfinite(score) and (state.selected is None or score > state.selected.score):
            state.selected = SelectedNetwork(state.progress.step, score, on_cpu(state.model.state_dict()))
        return {"accuracy": found.accuracy, "loss": found.loss, "balanced_accuracy": found.balanced_accuracy}

    def _measure(self, files: SplitFiles, collector: PredictionCollector | None = None) -> Evaluation:
        batches = reader.evaluation_blocks(
            files,
            rank=self._worker.rank,
            world_size=self._worker.world_size,
            batch_size=self._train.evaluation_batch_size,
            pin=self._worker.device.type == "cuda",
        )
        with Prefetch(batches) as ready:
            return evaluate(
                self._worker,
                self._state.model,
                self._with_signs_of_life(ready),
                classes=len(self._data.manifest.classes),
                split_rows=int(files.group_rows.sum()),
                channels_last=self._train.channels_last,
                collector=collector,
            )

    def _ids(self) -> np.ndarray:
        return reader.evaluation_ids(self._files, rank=self._worker.rank, world_size=self._worker.world_size)

    def _with_signs_of_life(self, batches: Iterable[T]) -> Iterator[T]:
        """The heartbeat sees that the rank gets on, batch by batch."""
        for batch in batches:
            self._worker.status.enter("evaluation")
            yield batch

    def close(self) -> None:
        self._files.close()
        if self._selection:
            self._selection.close()
