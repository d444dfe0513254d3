"""What goes on inside a network that trains: gradients, distributions of activations, and how smooth the loss is.

An observation makes extra passes over the batch of a step, on every rank. Hooks exist only while it lasts; buffers,
random states and weights are afterwards as they were: a training that is observed takes the same steps, bit for bit.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from pipeline.config.training import DiagnosticsSettings
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.layer_statistics import ActivationStatistics, StatisticsGap, Values, gradient_norms

# Steps along the gradient, as multiples of the learning rate (Santurkar et al. 2018, figure 4: from 1/2 to 4).
MULTIPLES = (0.5, 1.0, 2.0, 4.0)

Part = tuple[torch.Tensor, torch.Tensor]


class Diagnostics:
    """Observes a network while it trains, and emits what it saw as events of kind ``diagnostics``.

    An event has ``step``, ``seconds`` (how long this rank took) and ``values``, each a float, or None where it is not
    finite. Their names end with that of a layer, a module's name in the network:

    - ``gradient_norm/``: L2 norm of the gradient, averaged over ranks, by all parameters of a layer
    - ``activation_mean/``, ``activation_variance/``, ``activation_drift/``, ``activation_variance_ratio/``,
      ``dead_units/``, ``input_percentile_15/`` (50, 85): see `ActivationStatistics`
    - ``smoothness/``: ``loss``, ``beta``, ``loss_at_0.5``, ``gradient_change_at_0.5`` (1, 2, 4): see `_smoothness`
    - ``statistics_gap_mean/``, ``statistics_gap_variance/``, at evaluations alone: see `evaluation`

    The same values come out on every rank.

    Parameters
    ----------
    model : the bare network; what compiling or DistributedDataParallel put around it is not used
    loss : (images, labels, forward) -> mean loss of these rows, with ``forward`` in the place of the network
    emit : called as ``emit("diagnostics", **event)``
    """

    def __init__(
        self,
        worker: Worker,
        model: nn.Module,
        settings: DiagnosticsSettings,
        *,
        loss: Callable[[torch.Tensor, torch.Tensor, Callable[..., torch.Tensor]], torch.Tensor],
        emit: Callable[..., None],
    ):
        self._worker, self._model, self._settings, self._loss, self._emit = worker, model, settings, loss, emit
        self._parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._activations = ActivationStatistics(worker)

    def is_due(self, step: int) -> bool:
        """Whether to observe the step of this number, counted from 0. The same on every rank."""
        every = self._settings.every_steps
        return every is not None and step % every == 0

    def observe(self, step: int, learning_rate: float, parts: Sequence[Part]) -> float:
        """Observe the network between the gradients of a step and its update. Every rank calls it.

        Parameters
        ----------
        step : counted from 0; the event says ``step + 1``, as the event of kind ``step`` does for the same batch
        learning_rate : of this step
        parts : this rank's images and labels, in the parts in which the step's own forward passes took them

        Returns
        -------
        float
            Seconds that it took, which are none of the step's.
        """
        began = time.perf_counter()
        self._worker.status.enter("diagnostics")
        values = gradient_norms(self._model)
        with self._activations.watching(self._model):
            start = self._pass(parts, with_gradient=self._settings.smoothness)
        values |= self._activations.take()
        if self._settings.smoothness:
            values |= self._smoothness(start, learning_rate, parts)
        return self._report(step + 1, values, began)

    @contextmanager
    def evaluation(self, step: int) -> Iterator[None]:
        """Emit how far the statistics of evaluation batches are from those that norm layers evaluate with.

        The block is an evaluation of the network after ``step`` steps. The gaps are of each `RunningNorm` in evaluation
        mode, over the first ``evaluation_batches`` of each rank. Mean and std are what evaluation subtracts and divides
        by (`population`, so that variances have the layer's eps in them); means are over channels, batches and ranks::

            statistics_gap_mean     = mean(|mean_batch - mean_running| / std_running)
            statistics_gap_variance = mean(|log(var_batch / var_running)|)
        """
        if self._settings.every_steps is None:
            yield
            return
        gaps = StatisticsGap(self._model, self._settings.evaluation_batches)
        with gaps.watching():
            yield
        began = time.perf_counter()
        self._report(step, gaps.take(self._worker), began)

    def _report(self, step: int, values: Values, began: float) -> float:
        if values:
            together = torch.stack([value.double() for value in values.values()])  # for one transfer from the device
            finite = [number if math.isfinite(number) else None for number in together.tolist()]
            seconds = time.perf_counter() - began
            self._emit("diagnostics", step=step, seconds=seconds, values=dict(zip(values, finite, strict=True)))
        return time.perf_counter() - began

    def _pass(self, parts: Sequence[Part], *, with_gradient: bool) -> _Point:
        """Loss and gradient at the current weights, both means over ranks. Every pass of an observation begins with
        the same buffers and random states, so that it is of the same function; ``.grad`` and DDP are not touched."""
        loss = torch.zeros((), dtype=torch.float64, device=self._worker.device)
        gradient = torch.zeros(0, device=self._worker.device)
        rows = sum(len(images) for images, _ in parts)
        with untouched(self._model, self._worker.device):
            for images, labels in parts:
                with torch.set_grad_enabled(with_gradient):
                    part_loss = self._loss(images, labels, self._model.forward) / (rows / len(images))
                loss += part_loss.detach()
                if with_gradient:
                    gradients = torch.autograd.grad(
                        part_loss, self._parameters, allow_unused=True, materialize_grads=True
                    )
                    flat = torch.cat([values.reshape(-1) for values in gradients])
                    gradient = gradient + flat if len(gradient) else flat
        if with_gradient:
            gradient = self._worker.all_reduce_sum(gradient) / self._worker.world_size
        return _Point(self._worker.all_reduce_sum(loss) / self._worker.world_size, gradient)

    @torch.no_grad()
    def _smoothness(self, start: _Point, learning_rate: float, parts: Sequence[Part]) -> Values:
        """The loss and its gradient g along the gradient (Santurkar et al. 2018, section 3.1). At weights w - eta * g,
        eta a multiple of the learning rate, each rank on its own part of the same global batch; means over ranks::

            loss_at = loss(w - eta g),  gradient_change_at = |g(w - eta g) - g(w)|
            beta = max over eta of gradient_change_at / (eta |g|)

        The smaller the learning rate, the more of beta is the kinks of ReLU and max pooling, whose share of a change of
        gradient does not shrink with the distance: compare it between observations at one learning rate.
        """
        weights = [parameter.clone() for parameter in self._parameters]
        directions = start.gradient.split([parameter.numel() for parameter in self._parameters])
        norm = start.gradient.double().norm()
        values, betas = {"smoothness/loss": start.loss}, []
        try:
            for multiple in MULTIPLES:
                eta = multiple * learning_rate
                for parameter, weight, direction in zip(self._parameters, weights, directions, strict=True):
                    parameter.copy_(weight - eta * direction.view_as(weight))
                moved = self._pass(parts, with_gradient=True)
                change = (moved.gradient - start.gradient).double().norm()
                values[f"smoothness/loss_at_{multiple:g}"] = moved.loss
                values[f"smoothness/gradient_change_at_{multiple:g}"] = change
                betas.append(change / (eta * norm))
        finally:
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)
        values["smoothness/beta"] = torch.stack(betas).max()
        return values


class _Point(NamedTuple):
    """loss : float64 scalar; gradient : by all parameters, one after the other, or empty"""

    loss: torch.Tensor
    gradient: torch.Tensor


@contextmanager
def untouched(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Leave buffers, and the random states of torch, numpy and Python, as they were before the block."""
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), norm_statistics.preserve_buffers(model):
            yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
