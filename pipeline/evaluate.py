"""Exact distributed evaluation: every row of a split counts once, whatever the number of ranks.

Batch-norm statistics are reduced over the ranks first. The forward pass goes through the bare model: DDP would
broadcast buffers at every call, and ranks make different numbers of calls here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.reader import Batch
from pipeline.worker import Worker


@dataclass(frozen=True)
class Evaluation:
    """accuracy : share of rows whose largest logit is their label's; loss : mean cross-entropy in nats"""

    rows: int
    correct: int
    accuracy: float
    loss: float


def reduce_running_statistics(worker: Worker, model: nn.Module) -> None:
    """Give every rank the same batch-norm running statistics: those of all ranks' rows together.

    Law of total variance: the variance over all is the mean of the ranks' variances plus the variance of their means.
    Ranks count alike, since each has seen the same number of rows. Computed in float64.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if worker.world_size == 1 or not norms:
        return
    means = torch.cat([norm.running_mean.double() for norm in norms])  # type: ignore[union-attr]
    variances = torch.cat([norm.running_var.double() for norm in norms])  # type: ignore[union-attr]
    first, second = worker.all_reduce_sum(torch.stack([means, variances + means**2])) / worker.world_size
    start = 0
    for norm in norms:
        part = slice(start, start + norm.num_features)
        norm.running_mean.copy_(first[part])  # type: ignore[union-attr]
        norm.running_var.copy_((second - first**2)[part])  # type: ignore[union-attr]
        start += norm.num_features


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
        logits = model(images).float()
        sums[0] += len(labels)
        sums[1] += (logits.argmax(dim=1) == labels).sum()
        sums[2] += nn.functional.cross_entropy(logits, labels, reduction="sum").double()
    model.train(was_training)
    rows, correct, loss = worker.all_reduce_sum(sums).tolist()
    if int(rows) != split_rows:
        raise RuntimeError(f"evaluation saw {int(rows)} rows of a split that has {split_rows}")
    return Evaluation(int(rows), int(correct), correct / rows, loss / rows)
