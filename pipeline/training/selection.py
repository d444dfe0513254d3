"""The network that a training ends with: that of its last evaluation, or of the one that was best on another split.

The split that chooses is not the one that judges: with every evaluation, ``train.select_on`` is evaluated too, and the
network that is best there is kept. The training then ends with it, as if it had stopped there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from pipeline.config.training import TrainSettings
from pipeline.training.checkpoint import State
from pipeline.training.metrics import Evaluation


@dataclass(frozen=True)
class SelectedNetwork:
    """The best network so far.

    step : optimizer steps done at its evaluation
    score : what it was chosen by, the larger the better (see `score_on`)
    tensors : its state, by name, on the CPU: the weights and statistics that were evaluated
    """

    step: int
    score: float
    tensors: dict[str, torch.Tensor]

    def values(self) -> State:
        """The fields as a checkpoint keeps them."""
        return dict(vars(self))

    @classmethod
    def from_values(cls, values: State) -> SelectedNetwork:
        """What `values` gave, from whatever device it was loaded to."""
        return cls(**{**values, "tensors": {name: each.cpu() for name, each in values["tensors"].items()}})


def score_on(evaluation: Evaluation, train: TrainSettings) -> float:
    """What an evaluation of ``train.select_on`` is worth, the larger the better; minus infinity of no finite loss."""
    if train.final_network == "highest_accuracy":
        return evaluation.accuracy
    if train.final_network == "highest_balanced_accuracy":
        return evaluation.balanced_accuracy
    return -math.inf if evaluation.loss is None else -evaluation.loss
