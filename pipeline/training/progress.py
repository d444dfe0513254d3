"""What a training has reached, and all that it changes on its way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from pydantic import ValidationError
from torch import nn

from pipeline.training.checkpoint import CheckpointError, State
from pipeline.training.result import EvaluationPoint
from pipeline.training.selection import SelectedNetwork
from pipeline.training.timing import StepTimes
from pipeline.training.weight_average import WeightAverage


@dataclass
class Progress:
    """What a training has reached, over all its attempts; part of every checkpoint.

    step : optimizer steps done
    curve : one point for each evaluation
    recall : of each class at the newest evaluation, at the end at the one chosen; None of a class that the split lacks
    train_loss : mean loss of the steps since the evaluation before, one entry for each evaluation
    train_seconds : seconds of all optimizer steps so far, one entry for each evaluation
    selected_step : of the evaluation whose network the training has ended with, where another than the last was chosen
    step_seconds : of all optimizer steps so far
    loss_sum, loss_steps : of the steps since the last evaluation
    timed_images, timed_seconds, data_wait_seconds : of steps in a steady state
    diverged : the loss of the next step is not finite, and the training ends here
    """

    step: int = 0
    curve: list[EvaluationPoint] = field(default_factory=list)
    recall: list[float | None] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    train_seconds: list[float] = field(default_factory=list)
    step_seconds: float = 0.0
    loss_sum: float = 0.0
    loss_steps: int = 0
    timed_images: int = 0
    timed_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    diverged: bool = False
    selected_step: int | None = None

    def add_times(self, times: StepTimes, images: int) -> None:
        """Add the time of the step that has just ended, in which all ranks together took this many images."""
        self.step_seconds += times.last_seconds
        if times.steady:
            self.timed_images += images
            self.timed_seconds += times.last_seconds
            self.data_wait_seconds += times.last_data_wait_seconds

    def add_evaluation(self, point: EvaluationPoint, recall: Sequence[float | None]) -> float | None:
        """Add an evaluation, and return the mean loss of the steps since the one before; None where there were none."""
        train_loss = self.loss_sum / self.loss_steps if self.loss_steps else None
        self.loss_sum, self.loss_steps = 0.0, 0
        self.curve.append(point)
        self.recall = list(recall)
        self.train_loss.append(train_loss)
        self.train_seconds.append(self.step_seconds)
        return train_loss

    @property
    def final_point(self) -> EvaluationPoint:
        """The evaluation of the network that the training ends with."""
        return next((point for point in self.curve if point.step == self.selected_step), self.curve[-1])

    @property
    def images_per_second(self) -> float | None:
        return self.timed_images / self.timed_seconds if self.timed_seconds else None

    @property
    def data_wait_share(self) -> float | None:
        return self.data_wait_seconds / self.timed_seconds if self.timed_seconds else None

    def values(self) -> State:
        """The fields as plain values, as a checkpoint keeps them."""
        return {**vars(self), "curve": [point.model_dump() for point in self.curve]}

    @classmethod
    def from_values(cls, values: State) -> Progress:
        """What `values` gave.

        Raises
        ------
        CheckpointError
            Another version of sparknorm has written them, with other fields.
        """
        try:
            return cls(**{**values, "curve": [EvaluationPoint(**point) for point in values["curve"]]})
        except (TypeError, ValidationError) as error:
            raise CheckpointError(
                "another version of sparknorm has written the newest checkpoint, and its evaluations lack scores that "
                "this one counts (0.7.0 added some): train to the end with that version, or anew in another folder "
                "(`output`)"
            ) from error


@dataclass
class TrainingState:
    """All that a training changes, and its checkpoints hold.

    model : the bare network, which neither DistributedDataParallel nor ranks are part of
    average : of the weights, where ``train.weight_ema`` asks for one
    evaluated_state : of the newest evaluation, until the next step: the tensors, by name, in which the network that
        was evaluated differs from the one in training: its norm statistics and, with an average, its weights
    selected : the best network so far, where ``train.final_network`` asks for one
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: WeightAverage | None
    progress: Progress = field(default_factory=Progress)
    evaluated_state: dict[str, torch.Tensor] = field(default_factory=dict)
    selected: SelectedNetwork | None = None
