"""What an evaluation finds of each image, from its logits, and how ranks bring it together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from pipeline.distributed.worker import Worker
from pipeline.training import predictions
from pipeline.training.predictions import Predictions


class ImageScores(NamedTuple):
    """What an evaluation finds of each image of a batch, on the device of its logits.

    prediction : int64 (rows,), the class of the largest logit
    confidence : in the logits' dtype (rows,), softmax of that class
    loss : in the logits' dtype (rows,), cross-entropy in nats: minus the logarithm of the label's softmax
    """

    prediction: torch.Tensor
    confidence: torch.Tensor
    loss: torch.Tensor


def image_scores(logits: torch.Tensor, labels: torch.Tensor) -> ImageScores:
    """The scores of each image, from logits (rows, classes) and int64 labels (rows,). Nothing waits for the device."""
    prediction = logits.argmax(dim=1)
    log_probabilities = torch.log_softmax(logits, dim=1)
    confidence, log_likelihood = (
        log_probabilities.gather(1, classes.unsqueeze(1)).squeeze(1) for classes in (prediction, labels)
    )
    return ImageScores(prediction, confidence.exp(), -log_likelihood)


class PredictionCollector:
    """Keeps the scores of one evaluation on the device, 16 bytes an image, until all ranks gather them."""

    def __init__(self, device: torch.device):
        # A rank of a split with fewer rows than ranks may have none.
        no_class, no_score = (torch.empty(0, dtype=dtype, device=device) for dtype in (torch.int32, torch.float32))
        self._labels, self._predictions = [no_class], [no_class]
        self._confidences, self._losses = [no_score], [no_score]

    def add(self, labels: torch.Tensor, scores: ImageScores) -> None:
        """Add a batch, in the order in which this rank reads its part of the split. Nothing waits for the device."""
        self._labels.append(labels.int())
        self._predictions.append(scores.prediction.int())
        self._confidences.append(scores.confidence.float())
        self._losses.append(scores.loss.float())

    def gather(self, worker: Worker, ids: np.ndarray) -> Predictions | None:
        """The predictions of all ranks, on rank 0; None on the others. Every rank calls it.

        Parameters
        ----------
        ids : int64 (rows,), of the images that were added, in their order
        """
        columns = self._labels, self._predictions, self._confidences, self._losses
        own = Predictions(ids, *(torch.cat(batches).cpu().numpy() for batches in columns))
        parts = worker.gather_on_first(own)
        return None if parts is None else predictions.joined(parts)
