"""The one training loop. No Spark, no MLflow: `fit` needs a `Worker` and a `Job`, nothing else.

By hand, in a world of one::

    fit(worker.alone(), Job(dataset="runs/datasets/fashion_mnist", folder="runs/by-hand",
                            model=ModelSettings(), train=TrainSettings()))
"""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from models import build_model
from pipeline import storage
from pipeline.data import load_manifest, reader
from pipeline.data.loader import TrainLoader
from pipeline.distributed.gradients import GradientExchange
from pipeline.distributed.worker import Worker
from pipeline.telemetry.events import EventWriter
from pipeline.training import checkpoint, norm_statistics, rank_state
from pipeline.training.augment import augment
from pipeline.training.checkpoint_writer import CheckpointWriter
from pipeline.training.diagnostics import Diagnostics
from pipeline.training.evaluate import Evaluator
from pipeline.training.job import Job, Progress, identity
from pipeline.training.network import compile_model
from pipeline.training.optimizer import Schedule, make_optimizer
from pipeline.training.result import EvaluationPoint, RankSeconds, TrainResult
from pipeline.training.timing import Spent, StepTimes
from pipeline.training.weight_average import WeightAverage


class DivergedError(RuntimeError):
    """The loss of a run whose ``train.on_divergence`` is ``fail`` was not finite."""

    final = True  # the same steps from a checkpoint would diverge again


def fit(worker: Worker, job: Job) -> TrainResult:
    """Train to the end, evaluating and checkpointing on the way. Every rank calls it and gets the same result.

    Raises
    ------
    DivergedError
        The loss was not finite and ``train.on_divergence`` is ``fail``.
    """
    trainer = _Trainer(worker, job)
    try:
        return trainer.run()
    finally:
        with contextlib.suppress(OSError):  # the error that ends the training is the one to show
            trainer.close()


class _Trainer:
    def __init__(self, worker: Worker, job: Job):
        self.worker, self.job, self.status = worker, job, worker.status
        self.train = job.train.for_workers(worker.world_size)
        self.manifest = load_manifest(job.dataset, job.version)
        self.feed = TrainLoader(job.dataset, self.manifest, self.train, job.reader, worker)
        self.steps_per_epoch = self.feed.steps_per_epoch
        self.total_steps = self.steps_per_epoch * self.train.epochs
        self.schedule = Schedule(self.train, self.steps_per_epoch)
        self.memory_format = torch.channels_last if self.train.channels_last else torch.contiguous_format
        self.model = self._build()
        self.optimizer = make_optimizer(self.model, self.train)
        self.average = WeightAverage(self.model, self.train.weight_ema) if self.train.weight_ema else None
        self.evaluator = Evaluator(
            worker, self.model, self.average, job.dataset, self.manifest, self.train, job.reader, self._first_images
        )
        # What the newest evaluation judged and the network in training lacks, until the next step.
        self.judged: dict[str, torch.Tensor] = {}
        self.exchange = GradientExchange(worker, self.model, self.train.gradient_compression)
        self.progress = Progress()
        self.times = StepTimes()
        self.spent = [Spent() for _ in range(worker.world_size)]
        self.checkpoints = storage.join(job.folder, "checkpoints")
        self.identity = identity(job)
        self.writer = CheckpointWriter(self.checkpoints, self.identity, keep=job.checkpoint.keep, tell=self._emit)
        self.saved_at = time.monotonic()
        self.emitting = threading.Lock()
        self.events = EventWriter(storage.join(job.folder, "events"), worker.rank) if worker.rank == 0 else None
        self.diagnostics = Diagnostics(worker, self.model, self.train.diagnostics, loss=self._loss, tell=self._emit)

    def _build(self) -> nn.Module:
        statistics = self.manifest.split("train")
        model = build_model(
            self.job.model,
            image_shape=self.manifest.image.shape,
            num_classes=len(self.manifest.classes),
            mean=statistics.mean,
            std=statistics.std,
            seed=self.train.seed,
        ).to(self.worker.device)
        model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        lanes, parts = len(self.feed.lanes), self.train.accumulate
        if self.job.model.norm_statistics == "lane" and lanes % parts:
            raise ValueError(f"train.accumulate {parts} does not divide a worker's {lanes} lanes")
        norm_statistics.connect(model, self.worker, lanes=lanes // parts)
        if self.train.compile:
            compile_model(model, self.worker.device)
        return model

    def run(self) -> TrainResult:
        self._restore()
        self._emit(
            "start",
            step=self.progress.step,
            restored_from=self.progress.step,
            attempt=self.worker.attempt,
            world_size=self.worker.world_size,
            total_steps=self.total_steps,
            epochs=self.train.epochs,
            force=True,
        )
        with self.feed.batches(self.progress.step) as ready:
            while self.progress.step < self.total_steps and not self.progress.diverged:
                self._epoch(ready)
                self._save()
        self.status.enter("checkpoint")
        self.writer.finish()
        self.worker.wait_for_all()
        self.status.enter("end")
        if self.events:
            self.events.flush()
        return self._result()

    def close(self) -> None:
        if self.events:
            self.events.flush()
        self.feed.close()
        self.evaluator.close()

    def _epoch(self, ready: Iterator[reader.Batch]) -> None:
        epoch, first_step = divmod(self.progress.step, self.steps_per_epoch)
        evaluate_after = {
            self.steps_per_epoch * part // self.train.evaluations_per_epoch
            for part in range(1, self.train.evaluations_per_epoch + 1)
        }
        for step_in_epoch in range(first_step, self.steps_per_epoch):
            save = self._step(ready)
            if self.progress.diverged or step_in_epoch + 1 in evaluate_after:
                self._evaluate(epoch)
            if self.progress.diverged:
                return
            if save and step_in_epoch + 1 < self.steps_per_epoch:
                self._save()

    def _step(self, batches: Iterator[reader.Batch]) -> bool:
        """One optimizer step on one global batch; a loss that is not finite on any rank stops all before it.

        Returns whether a checkpoint is due, which rank 0 decides and all ranks learn with the loss.
        """
        step, times = self.progress.step, self.times
        self.status.enter("data loading", epoch=step // self.steps_per_epoch, step=step)
        times.begin()
        batch = next(batches)
        times.data_is_there()
        rate, momentum = self.schedule.learning_rate(step), self.schedule.momentum(step)
        for group in self.optimizer.param_groups:
            group["lr"], group["momentum"] = rate, momentum
        self.optimizer.zero_grad(set_to_none=True)
        loss, save = self._gradients(batch, step)
        if not math.isfinite(loss):
            self._diverge(step, rate)
            return False
        if self.diagnostics.is_due(step):
            times.leave_out(self.diagnostics.look(step, rate, self._parts(batch, step)))
        self.status.enter("optimizer step")
        self.optimizer.step()
        self.judged = {}
        self.progress.step += 1
        if self.average:
            self.average.update(self.progress.step)
        self.progress.loss_sum += loss
        self.progress.loss_steps += 1
        times.end()
        self.progress.step_seconds += times.last_seconds
        if times.steady:
            self.progress.timed_images += self.train.global_batch
            self.progress.timed_seconds += times.last_seconds
            self.progress.data_wait_seconds += times.last_data_wait_seconds
        if self.progress.step % self.train.log_every_steps == 0:
            self._emit("step", step=self.progress.step, loss=loss, learning_rate=rate)
        return save

    def _gradients(self, batch: reader.Batch, step: int) -> tuple[float, bool]:
        """Forward and backward: (the mean loss of the global batch, whether a checkpoint is due)."""
        parts = self._parts(batch, step)
        # The loss travels while the backward pass computes, and with it rank 0's word on a checkpoint.
        shared = torch.zeros(2, dtype=torch.float64, device=self.worker.device)
        pending = None
        for number, (images, labels) in enumerate(parts):
            last = number + 1 == len(parts)
            with contextlib.nullcontext() if last else self.exchange.local():
                self.status.enter("forward")
                loss = self._loss(images, labels) / len(parts)
                shared[0] += loss.detach()
                if last:
                    shared[1] = float(self.worker.rank == 0 and self._is_due(step + 1))
                    self.own_loss = shared[0].clone()
                    pending = self.worker.all_reduce_start(shared)
                self.status.enter("backward")
                loss.backward()
        computed = self.exchange.ready_at or time.perf_counter()
        self.status.enter("all-reduce")
        if pending is not None:
            pending.wait()
        loss_sum, due = shared.tolist()
        self.times.gradients_are_there(computed if self.worker.world_size > 1 else None)
        return loss_sum / self.worker.world_size, due > 0

    def _parts(self, batch: reader.Batch, step: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """This rank's part of the global batch on its device, augmented, in ``train.accumulate`` parts of one size."""
        device = self.worker.device
        images = batch.images.to(device, non_blocking=True)
        labels = batch.labels.to(device, non_blocking=True)
        images = augment(
            images,
            self.train.augment,
            seed=self.train.seed,
            step=step,
            lanes=self.feed.lanes,
            num_lanes=self.train.lanes,
            mean=self.manifest.split("train").mean,
        ).contiguous(memory_format=self.memory_format)
        count = self.train.accumulate
        return list(zip(images.chunk(count), labels.chunk(count), strict=True))

    def _loss(
        self, images: torch.Tensor, labels: torch.Tensor, forward: Callable[..., torch.Tensor] | None = None
    ) -> torch.Tensor:
        """Mean cross-entropy of what ``forward``, by default that which exchanges gradients, makes of the images."""
        with torch.autocast(self.worker.device.type, torch.bfloat16, enabled=self.train.bf16):
            logits = (forward or self.exchange.forward)(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return nn.functional.cross_entropy(logits, labels, label_smoothing=self.train.label_smoothing)

    def _diverge(self, step: int, rate: float) -> None:
        """All ranks are here, and none has changed a weight."""
        losses = self.worker.gather(float(self.own_loss))
        ranks = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
        text = f"the loss of rank {', '.join(map(str, ranks))} is not finite at step {step}, learning rate {rate:g}"
        self._emit("diverged", step=step, learning_rate=rate, text=text, force=True)
        if self.train.on_divergence == "fail":
            raise DivergedError(f"{text}: lower train.learning_rate, or set train.on_divergence to mark")
        self.progress.diverged = True

    def _evaluate(self, epoch: int) -> None:
        self.status.enter("evaluation")
        with self.diagnostics.evaluation(self.progress.step):
            result, self.judged = self.evaluator.run()
        progress = self.progress
        train_loss = progress.loss_sum / progress.loss_steps if progress.loss_steps else None
        progress.loss_sum, progress.loss_steps = 0.0, 0
        point = EvaluationPoint(
            step=progress.step,
            epoch=progress.step / self.steps_per_epoch,
            accuracy=result.accuracy,
            loss=result.loss if math.isfinite(result.loss) else None,  # JSON has no infinity
        )
        progress.curve.append(point)
        progress.train_loss.append(train_loss)
        progress.train_seconds.append(progress.step_seconds)
        ranks = self._gather_times()
        self._emit(
            "evaluation",
            **point.model_dump(),
            train_loss=train_loss,
            split=self.train.evaluate_on,
            statistics="precise" if self.evaluator.precise else "ema",
            images_per_second=self._images_per_second(),
            ranks=ranks,
            force=True,
        )

    def _first_images(self) -> Iterator[torch.Tensor]:
        """This rank's images of the first batches of the epoch that was trained last, as they were trained on."""
        first = max(0, self.progress.step - 1) // self.steps_per_epoch * self.steps_per_epoch
        count = min(self.train.precise_batches, self.steps_per_epoch)
        with self.feed.batches(first) as ready:
            for step, batch in enumerate(itertools.islice(ready, count), first):
                yield from (images for images, _ in self._parts(batch, step))

    def _gather_times(self) -> list[dict[str, Any]]:
        """What each rank spent its time on since the last evaluation."""
        spent = self.worker.gather(self.times.take())
        for total, new in zip(self.spent, spent, strict=True):
            total.add(new)
        return [{"rank": rank, **asdict(new)} for rank, new in enumerate(spent)]

    def _save(self) -> None:
        """All ranks give what they alone know; rank 0 writes, while training goes on.

        ``model`` is what an evaluation judges: at the end of an epoch and of the training, with its norm statistics.
        """
        self.status.enter("checkpoint")
        ranks = self.worker.gather(rank_state.capture(self.worker, self.model))
        if self.worker.rank == 0:
            averaged = self.average.state() if self.average else {}
            state = {
                "model": {**self.model.state_dict(), **averaged, **self.judged},
                "weights": dict(self.model.named_parameters()) if self.average else {},
                "optimizer": self.optimizer.state_dict(),
                "progress": self.progress.state(),
                "ranks": ranks,
            }
            self.writer.begin(state, self.progress.step)
        self.saved_at = time.monotonic()

    def _is_due(self, step: int) -> bool:
        """Rank 0's word on whether to save after this step; not before the last state is written."""
        when = self.job.checkpoint
        if self.writer.busy:
            return False
        if when.every_steps is not None:
            return step % when.every_steps == 0
        return time.monotonic() - self.saved_at >= when.every_seconds

    def _restore(self) -> None:
        """Rank 0 finds the newest whole checkpoint and the others load that very one, or fail."""
        self._warm_up()
        self.status.enter("restore")
        rank_state.seed_all(self.worker, self.train.seed)
        device, state = self.worker.device, None
        if self.worker.rank == 0:
            state = checkpoint.load_newest(self.checkpoints, identity=self.identity, device=device, mend=True)
        found = torch.tensor(state["progress"]["step"] if state else 0, device=device)
        with self.status.waiting():
            step = int(self.worker.all_reduce_sum(found))
        if step and self.worker.rank > 0:
            state = checkpoint.load_step(self.checkpoints, step, identity=self.identity, device=device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            if self.average:
                self.average.load(state["model"])
                self.model.load_state_dict(state["weights"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress.from_state(state["progress"])
            rank_state.restore(self.worker, self.model, state["ranks"], seed=self.train.seed, step=step)
            self.writer.path = storage.join(self.checkpoints, f"step-{step:08d}.pt")

    def _warm_up(self) -> None:
        """See `GradientExchange.warm_up`; what it changes in the norms' buffers is undone."""
        rows = self.train.global_batch // self.worker.world_size // self.train.accumulate
        images = torch.zeros(rows, *self.manifest.image.shape, dtype=torch.uint8, device=self.worker.device)
        with norm_statistics.kept(self.model):
            self.exchange.warm_up(images.contiguous(memory_format=self.memory_format))

    def _emit(self, kind: str, *, force: bool = False, **fields: Any) -> None:
        if self.events:
            with self.emitting:  # the checkpoint's thread has something to tell too
                self.events.emit(kind, **fields)
                if force:
                    self.events.flush()

    def _images_per_second(self) -> float | None:
        seconds = self.progress.timed_seconds
        return self.progress.timed_images / seconds if seconds else None

    def _result(self) -> TrainResult:
        progress = self.progress
        accuracies = [point.accuracy for point in progress.curve]
        seconds = progress.timed_seconds
        return TrainResult(
            best_accuracy=max(accuracies),
            final_accuracy=accuracies[-1],
            steps=progress.step,
            images_per_second=self._images_per_second(),
            data_wait_share=progress.data_wait_seconds / seconds if seconds else None,
            diverged=progress.diverged,
            curve=tuple(progress.curve),
            train_loss=tuple(progress.train_loss),
            train_seconds=tuple(progress.train_seconds),
            checkpoint=self.worker.gather(self.writer.path)[0],
            world_size=self.worker.world_size,
            attempts=self.worker.attempt,
            ranks=tuple(RankSeconds(rank=rank, **asdict(spent)) for rank, spent in enumerate(self.spent)),
        )
