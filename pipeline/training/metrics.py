"""How well a network classifies a split: counts that batches add to and ranks sum, and the scores that follow."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

import torch

from pipeline.distributed.worker import Worker
from pipeline.training.image_scores import ImageScores

# Bins of equal width in which confidence is compared with accuracy, as in section 4 of Guo et al. (2017).
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """What a network makes of a whole split. Scores are shares from 0 to 1, the loss is in nats.

    rows, correct : images, and those whose largest logit is their label's
    accuracy : correct / rows
    loss : mean cross-entropy, the negative log-likelihood of the labels; None where it is not finite
    balanced_accuracy : mean recall of the classes that the split has (Brodersen et al. 2010)
    macro_f1 : mean F1 score of the classes that the split has or that were predicted
    calibration_error : expected calibration error of the predicted class, over 15 bins of equal width (Guo et al. 2017,
        equation 3); None where a confidence is not finite
    recall : of each class, its correct images / its images; None of one that the split does not have
    """

    rows: int
    correct: int
    accuracy: float
    loss: float | None
    balanced_accuracy: float
    macro_f1: float
    calibration_error: float | None
    recall: tuple[float | None, ...]


class EvaluationCounts:
    """Sums over the images of a split, in one float64 tensor on the device: batches add to it, and ranks sum it once.

    Counts in float64 are exact up to 2^53, and sums over bins have one order, so that the same images in the same
    batches give the same bits.
    """

    def __init__(self, classes: int, device: torch.device):
        self._sums = torch.zeros(1 + 3 * classes + CALIBRATION_BINS, dtype=torch.float64, device=device)
        # Views: the sum of losses; images of each class, hits among them, images it was predicted for; and of the
        # images in each bin of the confidence, the sum of confidence less hit.
        self._parts = self._sums.split([1, 3 * classes, CALIBRATION_BINS])
        self._loss, of_classes, self._gaps = self._parts
        self._of_classes = of_classes.view(3, classes)
        self._bins = torch.arange(CALIBRATION_BINS, device=device).unsqueeze(1)

    def update(self, labels: torch.Tensor, scores: ImageScores) -> None:
        """Add a batch of int64 labels (rows,) and their scores. Nothing waits for the device."""
        hits = (scores.prediction == labels).double()
        ones = torch.ones_like(hits)
        self._loss += scores.loss.double().sum()
        for counts, classes, amounts in zip(
            self._of_classes, (labels, labels, scores.prediction), (ones, hits, ones), strict=True
        ):
            counts.index_add_(0, classes, amounts)
        confidence = scores.confidence.double()
        # Bin m holds the confidences above (m - 1) / 15 and up to m / 15. One that is not a number goes into the first
        # bin, whose sum then is none either.
        bins = (confidence.nan_to_num(0.0) * CALIBRATION_BINS).ceil().long().sub(1).clamp(0, CALIBRATION_BINS - 1)
        self._gaps += torch.where(bins == self._bins, confidence - hits, 0.0).sum(1)

    def sum_over(self, worker: Worker, split_rows: int) -> Evaluation:
        """The scores of the images of all ranks. Every rank calls it once, and gets the same.

        Raises
        ------
        RuntimeError
            The ranks together did not see ``split_rows`` rows.
        """
        worker.all_reduce_sum(self._sums)
        loss, of_classes, in_bins = self._sums.cpu().split([len(part) for part in self._parts])  # one wait for a GPU
        loss = float(loss)
        rows, hits, predicted = of_classes.view(3, -1).tolist()
        total, correct = int(sum(rows)), int(sum(hits))
        if total != split_rows:
            raise RuntimeError(f"evaluation saw {total} rows of a split that has {split_rows}")
        recall = tuple(hit / count if count else None for hit, count in zip(hits, rows, strict=True))
        f1 = [2 * hit / sum(counts) for hit, *counts in zip(hits, rows, predicted, strict=True) if any(counts)]
        gaps = float(in_bins.abs().sum())
        return Evaluation(
            rows=total,
            correct=correct,
            accuracy=correct / total,
            loss=loss / total if math.isfinite(loss) else None,
            balanced_accuracy=statistics.fmean(share for share in recall if share is not None),
            macro_f1=statistics.fmean(f1),
            calibration_error=gaps / total if math.isfinite(gaps) else None,
            recall=recall,
        )
