"""One optimizer step on one global batch: data, forward, backward, exchange of gradients, update."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from pipeline.config.training import TrainSettings
from pipeline.data.reader import Batch
from pipeline.distributed.gradients import GradientExchange
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics
from pipeline.training.batch import DeviceBatches, Part
from pipeline.training.diagnostics import Diagnostics
from pipeline.training.event_log import EventLog
from pipeline.training.graph import PassGraph, UpdateGraph
from pipeline.training.hooks import CallHook
from pipeline.training.optimizer import Schedule, set_rates
from pipeline.training.progress import TrainingState
from pipeline.training.readback import Readback
from pipeline.training.timing import StepTimes
from pipeline.training.word import Word


class DivergedError(RuntimeError):
    """The loss of a run whose ``train.on_divergence`` is ``fail`` was not finite."""

    final = True  # the same steps from a checkpoint would diverge again


@dataclass(frozen=True)
class MeanLoss:
    """Mean cross-entropy of a batch, in nats: with bfloat16 autocast and smoothed labels where ``train`` says so.

    Labels are numbers of classes, int64 (rows,), or where images are mixed the share of each class, (rows, classes).

    class_weights : float (classes,), on the device, as `class_weights` makes them; None: all 1. The loss is then the
        sum of weight times cross-entropy over the rows, divided by their number and not, as torch does, by the sum of
        their weights: so parts of a batch of one size add up to the whole, whatever rows each has.
    """

    train: TrainSettings
    device_type: str
    class_weights: torch.Tensor | None = None

    def __call__(
        self, images: torch.Tensor, labels: torch.Tensor, forward: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        """A scalar in float32, or in float64 for a network in float64. ``forward`` gives logits for images."""
        with torch.autocast(self.device_type, torch.bfloat16, enabled=self.train.bf16):
            logits = forward(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
        smoothing, weights = self.train.label_smoothing, self.class_weights
        if weights is None:
            return nn.functional.cross_entropy(logits, labels, label_smoothing=smoothing)
        total = nn.functional.cross_entropy(
            logits, labels, weights.to(logits.dtype), label_smoothing=smoothing, reduction="sum"
        )
        return total / len(labels)


class Gradients(NamedTuple):
    """What a forward and backward pass of all ranks has brought, besides the gradients themselves.

    loss : mean over the global batch
    rank_loss : mean over this rank's rows, float64 (1,) on the device
    word : of rank 0, on what follows this step
    """

    loss: float
    rank_loss: torch.Tensor
    word: Word


@dataclass
class TrainStep:
    """Takes the optimizer steps of one rank; every rank takes the same ones.

    train : with the global batch of the whole training
    clip : holds the gradients within bounds before they are used; diagnostics see them as they are
    word_after : says what to do after so many steps; rank 0's word counts, and travels with the loss
    """

    worker: Worker
    train: TrainSettings
    state: TrainingState
    data: DeviceBatches
    exchange: GradientExchange
    schedule: Schedule
    loss: MeanLoss
    diagnostics: Diagnostics
    events: EventLog
    word_after: Callable[[int], Word]
    times: StepTimes
    hook: CallHook = None
    clip: Callable[[], None] | None = None
    _readback: Readback = field(init=False)
    _passes: PassGraph | None = field(init=False, default=None)
    _update_graph: UpdateGraph | None = field(init=False, default=None)
    _has_updated: bool = field(init=False, default=False)  # in this attempt

    def __post_init__(self) -> None:
        self._readback = Readback(self.worker.device, 2)

    def warm_up(self) -> None:
        """Take what only the first pass of an attempt does, without consequence: see `GradientExchange.warm_up`.

        With ``train.cuda_graphs`` the passes are recorded here.
        """
        images, labels = self.data.blank()
        with norm_statistics.preserve_buffers(self.state.model):
            if self.train.cuda_graphs and self.worker.device.type == "cuda":
                self._passes = PassGraph(self.state.model, self._loss, (images, labels))
            else:
                self.exchange.warm_up(lambda: self._loss(images, labels))

    def take(self, batches: Iterator[Batch]) -> Word:
        """Take the next batch and make one step. A loss that is not finite on any rank stops all before the update.

        Returns
        -------
        Word
            What follows this step, which rank 0 decides and all ranks learn with the loss.

        Raises
        ------
        DivergedError
            The loss is not finite and ``train.on_divergence`` is ``fail``; else ``progress.diverged`` is then true.
        """
        state, times, optimizer = self.state, self.times, self.state.optimizer
        step = state.progress.step
        self.worker.status.enter("data loading", epoch=step // self.schedule.steps_per_epoch, step=step)
        if self.hook:
            self.hook("before_data", step=step)
        times.begin()
        batch = next(batches)
        times.data_arrived()
        rate, momentum = self.schedule.learning_rate(step), self.schedule.momentum(step)
        set_rates(optimizer, rate, momentum)
        if not self._passes:  # their gradients stay where they were recorded
            optimizer.zero_grad(set_to_none=True)
        loss, rank_loss, word = self.gradients(batch, step)
        if not math.isfinite(loss):
            self._diverge(step, rate, rank_loss)
            return Word.GO_ON
        if self.diagnostics.is_due(step):
            times.leave_out(self.diagnostics.observe(step, rate, self.data.parts(batch, step)))
        self.worker.status.enter("optimizer step")
        self._update()
        self._count(loss, rate)
        return word

    def gradients(self, batch: Batch, step: int) -> Gradients:
        """Forward and backward: afterwards ``.grad`` of every parameter is that of the global batch."""
        enter, parts = self.worker.status.enter, self.data.parts(batch, step)
        if self._passes:
            return self._recorded(self._passes, parts[0], step)
        losses: list[torch.Tensor] = []
        rows = sum(len(labels) for _, labels in parts)
        for number, (images, labels) in enumerate(parts):
            last = number + 1 == len(parts)
            with contextlib.nullcontext() if last else self.exchange.local():
                enter("forward")
                loss = self._loss(images, labels)
                loss = loss if len(parts) == 1 else loss / (rows / len(labels))
                losses.append(loss.detach().double())
                if last:
                    # The loss travels while the backward pass computes, and with it rank 0's word.
                    rank_loss = torch.stack(losses).sum(0, keepdim=True) if number else losses[0].view(1)
                    shared = nn.functional.pad(rank_loss, (0, 1), value=float(self.word_after(step + 1)))
                    self._readback.begin(shared, self.worker.all_reduce_start(shared))
                enter("backward")
                loss.backward()
        computed_at = self.exchange.ready_at or time.perf_counter()
        enter("all-reduce")
        loss_sum, word = self._readback.wait()
        self.times.gradients_arrived(self._waited(computed_at))
        return Gradients(loss_sum / self.worker.world_size, rank_loss, Word(int(word)))

    def _loss(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.loss(images, labels, self.exchange.forward)

    def _recorded(self, passes: PassGraph, part: Part, step: int) -> Gradients:
        """`gradients` by CUDA graphs, in a world of one."""
        enter = self.worker.status.enter
        enter("forward")
        passes.forward(*part)
        self._readback.begin(passes.loss, None)
        enter("backward")
        passes.backward()
        word = self.word_after(step + 1)
        (loss,) = self._readback.wait()
        self.times.gradients_arrived(0.0)
        return Gradients(loss, passes.loss, word)

    def _waited(self, computed_at: float) -> float:
        """Seconds that this rank waited for the gradients of the others."""
        if self.worker.device.type == "cuda":
            return self.exchange.waited_on_gpu()
        return time.perf_counter() - computed_at if self.worker.world_size > 1 else 0.0

    def _update(self) -> None:
        optimizer = self.state.optimizer
        # Only learning rates of a recorded update can change; and its first step makes the optimizer's buffers, if any.
        is_first = not (optimizer.state or self._has_updated)
        varies = self.train.schedule == "one_cycle" or is_first
        if self._passes is None or varies:
            self._change_weights()
            self._has_updated = True
            return
        if self._update_graph is None:
            self._update_graph = UpdateGraph(optimizer, self._change_weights)
        self._update_graph.step(group["lr"] for group in optimizer.param_groups)

    def _change_weights(self) -> None:
        if self.clip:
            self.clip()
        self.state.optimizer.step()

    def _count(self, loss: float, rate: float) -> None:
        """A step has changed the weights: what follows from that."""
        state, progress = self.state, self.state.progress
        state.evaluated_state = {}
        progress.step += 1
        if state.average:
            state.average.update(progress.step)
        progress.loss_sum += loss
        progress.loss_steps += 1
        self.times.end()
        progress.add_times(self.times, self.train.global_batch)
        if progress.step % self.train.log_every_steps == 0:
            self.events.emit("step", step=progress.step, loss=loss, learning_rate=rate)
        if self.hook:
            self.hook("after_step", step=progress.step, loss=loss)

    def _diverge(self, step: int, rate: float, rank_loss: torch.Tensor) -> None:
        """All ranks are here, and none has changed a weight."""
        losses = self.worker.gather(float(rank_loss))
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        text = f"the loss of rank {', '.join(map(str, ranks))} is not finite at step {step}, learning rate {rate:g}"
        self.events.emit("diverged", step=step, learning_rate=rate, text=text, force=True)
        if self.train.on_divergence == "fail":
            raise DivergedError(f"{text}: lower train.learning_rate, or set train.on_divergence to mark")
        self.state.progress.diverged = True
