"""Exact distributed evaluation: every row of a split counts once, whatever the number of ranks.

The forward pass goes through the bare model: DDP would broadcast buffers at every call, and ranks make different
numbers of calls here.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import nn

from models.modes import evaluating
from models.saved_state import copies, load_saved
from pipeline.config.dataset import ReaderSettings
from pipeline.data.reader import Batch
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.batch import DeviceBatches
from pipeline.training.checkpoint_writer import on_cpu
from pipeline.training.diagnostics import untouched
from pipeline.training.evaluation_split import EvaluationSplit
from pipeline.training.image_scores import PredictionCollector, image_scores
from pipeline.training.metrics import Evaluation, EvaluationCounts
from pipeline.training.predictions import Predictions
from pipeline.training.progress import TrainingState
from pipeline.training.selection import SelectedNetwork, score_on

T = TypeVar("T")

# Rows whose logits are scored together on a GPU: launching the many small kernels of the scores takes the host as long
# as launching the network's.
_SCORED_ON_GPU = 8192


@torch.inference_mode()
def evaluate(
    worker: Worker,
    model: nn.Module,
    batches: Iterator[Batch],
    *,
    classes: int,
    split_rows: int,
    bf16: bool = False,
    collector: PredictionCollector | None = None,
) -> Evaluation:
    """The scores of a network over all rows of a split.

    Parameters
    ----------
    model : the bare model, not its DDP wrapper; each of its modules is left in the mode it was in
    batches : this rank's share of the split, on its device
    classes : how many the dataset has, as many as the network has logits
    split_rows : rows of the split over all ranks
    bf16 : whether to autocast to bfloat16, as the network was trained; scores are computed in float32
    collector : gets the scores of each image

    Raises
    ------
    RuntimeError
        The ranks together did not see ``split_rows`` rows.
    """
    counts = EvaluationCounts(classes, worker.device)

    def forward(images: torch.Tensor) -> torch.Tensor:
        with torch.autocast(worker.device.type, torch.bfloat16, enabled=bf16):
            logits = model.forward(images)  # not the compiled call: the last batch has another size
        return logits if logits.dtype == torch.float64 else logits.float()

    outputs = ((forward(images), labels) for images, labels, *_ in batches)
    with evaluating(model):
        for logits, labels in _joined(outputs, _SCORED_ON_GPU if worker.device.type == "cuda" else 1):
            scores = image_scores(logits, labels)
            counts.update(labels, scores)
            if collector is not None:
                collector.add(labels, scores)
    with worker.status.waiting():
        return counts.sum_over(worker, split_rows)


def _joined(outputs: Iterator[tuple[torch.Tensor, torch.Tensor]], rows: int) -> Iterator[list[torch.Tensor]]:
    """Logits and labels of batches, of so many together that they have at least ``rows`` rows, but for the last."""
    waiting: list[tuple[torch.Tensor, torch.Tensor]] = []
    for output in outputs:
        waiting.append(output)
        if sum(len(labels) for _, labels in waiting) >= rows:
            yield [torch.cat(parts) for parts in zip(*waiting, strict=True)]
            waiting = []
    if waiting:
        yield [torch.cat(parts) for parts in zip(*waiting, strict=True)]


class EvaluatedNetwork(NamedTuple):
    """What an evaluation in the middle or at the end of a training has found.

    state : the tensors, by each of their names, in which the network that was evaluated differs from the one in
        training
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

        def share_of(split: str) -> EvaluationSplit:
            return EvaluationSplit(data.worker, dataset, data.manifest, split, data.train, settings)

        self._split = share_of(data.train.evaluate_on)
        self._selection = None if data.train.final_network == "last" else share_of(data.train.select_on)
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
        with untouched(model, worker.device), as_averaged:
            if self.precise:
                images = self._data.first_images(self._state.progress.step)
                with torch.autocast(worker.device.type, torch.bfloat16, enabled=self._train.bf16):
                    norm_statistics.precise(worker, model, self._with_signs_of_life(images))
            else:
                norm_statistics.of_all_ranks(worker, model, self._train.global_batch // worker.world_size)
            evaluation = self.measure(collector)
            selection = self._select(self._selection) if self._selection else None
            evaluated_state = copies(model, weights=average is not None)
        predictions = collector.gather(worker, self._split.ids()) if collector is not None else None
        return EvaluatedNetwork(evaluation, evaluated_state, predictions, selection)

    def run_selected(self, selected: SelectedNetwork) -> EvaluatedNetwork:
        """Evaluate a network that was kept, and leave it in the place of the one in training. Every rank calls it."""
        worker, model = self._worker, self._state.model
        load_saved(model, selected.tensors)
        collector = PredictionCollector(worker.device)
        evaluation = self.measure(collector)
        return EvaluatedNetwork(evaluation, dict(selected.tensors), collector.gather(worker, self._split.ids()))

    def measure(self, collector: PredictionCollector | None = None) -> Evaluation:
        """The scores of the network as it is, over the split that judges. Every rank calls it."""
        return self._measure(self._split, collector)

    def _select(self, split: EvaluationSplit) -> dict[str, float | None]:
        """Measure the network as it is on the split that chooses, and keep it if none before was as good."""
        state, found = self._state, self._measure(split)
        score = score_on(found, self._train)
        if math.isfinite(score) and (state.selected is None or score > state.selected.score):
            state.selected = SelectedNetwork(state.progress.step, score, on_cpu(state.model.state_dict()))
        return {"accuracy": found.accuracy, "loss": found.loss, "balanced_accuracy": found.balanced_accuracy}

    def _measure(self, split: EvaluationSplit, collector: PredictionCollector | None = None) -> Evaluation:
        with split.batches() as batches:
            return evaluate(
                self._worker,
                self._state.model,
                self._with_signs_of_life(batches),
                classes=len(self._data.manifest.classes),
                split_rows=split.rows,
                bf16=self._train.bf16,
                collector=collector,
            )

    def _with_signs_of_life(self, batches: Iterable[T]) -> Iterator[T]:
        """The heartbeat sees that the rank gets on, batch by batch."""
        for batch in batches:
            self._worker.status.enter("evaluation")
            yield batch

    def close(self) -> None:
        self._split.close()
        if self._selection:
            self._selection.close()
