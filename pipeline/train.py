"""The one training loop. No Spark, no MLflow: `fit` needs a `Worker` and a `Job`, nothing else.

By hand, in a world of one::

    fit(worker.alone(), Job(dataset="runs/datasets/fashion_mnist", folder="runs/by-hand",
                            model=ModelSettings(), train=TrainSettings()))
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from models import build_model
from pipeline import checkpoint, reader, storage
from pipeline.augment import augment
from pipeline.config import ModelSettings, TrainSettings, digest_of
from pipeline.data_settings import ReaderSettings
from pipeline.evaluate import evaluate, reduce_running_statistics
from pipeline.events import EventWriter
from pipeline.feed import TrainingFeed
from pipeline.manifest import load as load_manifest
from pipeline.prefetch import Prefetch
from pipeline.shards import SplitFiles
from pipeline.worker import Worker

# Steps at the start of an attempt that a throughput figure leaves out: memory is allocated, kernels are chosen.
WARM_UP_STEPS = 10
TOKEN = "launch-token"


@dataclass(frozen=True)
class Job:
    """What to train. ``folder`` gets the checkpoints and events; a job that finds its checkpoints there goes on."""

    dataset: str
    folder: str
    model: ModelSettings
    train: TrainSettings
    reader: ReaderSettings = field(default_factory=ReaderSettings)
    version: int | None = None  # of the dataset; None is the newest
    token: str = ""  # what the driver wrote into the file `TOKEN` of the folder, to see that every rank sees it


@dataclass
class Progress:
    """What a run has reached; part of every checkpoint.

    curve : one entry for each evaluation: step, epoch, accuracy, loss
    train_loss : mean loss of the steps since the evaluation before, one entry for each evaluation
    """

    step: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    train_loss: list[float | None] = field(default_factory=list)
    timed_images: int = 0
    timed_seconds: float = 0.0
    data_wait_seconds: float = 0.0
    diverged: bool = False


def facts(job: Job) -> dict[str, Any]:
    """What every rank must see alike before step one; a launcher compares them over the ranks.

    Raises
    ------
    ValueError
        The job's folder here is not the one that the driver sees.
    """
    if job.token:
        path = storage.join(job.folder, TOKEN)
        if not storage.exists(path) or storage.read_bytes(path).decode() != job.token:
            raise ValueError(f"{path}, written by the driver, is not seen here: set `output` to a place that all share")
    return {
        "settings": digest_of(
            {"model": job.model.model_dump(), "train": job.train.model_dump(), "reader": job.reader.kind}
        ),
        "dataset": load_manifest(job.dataset, job.version).digest,
    }


def fit(worker: Worker, job: Job) -> dict[str, Any]:
    """Train to the end, evaluating and checkpointing on the way. Every rank calls it and gets the same result.

    Returns
    -------
    dict
        best_accuracy, final_accuracy, steps, images_per_second, data_wait_share, diverged, curve, train_loss,
        checkpoint (path of the last one)
    """
    trainer = _Trainer(worker, job)
    try:
        return trainer.run()
    finally:
        trainer.close()


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up (Goyal et al. 2017, section 2.2), then a cosine to 0
    (Loshchilov & Hutter 2017, equation 5)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.SGD:
    """SGD with Nesterov momentum. Norm parameters and biases, the ones with a single axis, do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=train.momentum > 0)


def _without_buffer_sync() -> dict[str, Any]:
    """DDP's setting under its current name, or the one it had before torch 2.13."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}


class _Trainer:
    def __init__(self, worker: Worker, job: Job):
        self.worker, self.job, self.train = worker, job, job.train
        self.manifest = load_manifest(job.dataset, job.version)
        self.feed = TrainingFeed(job.dataset, self.manifest, self.train, job.reader, worker)
        self.steps_per_epoch = self.feed.steps_per_epoch
        self.total_steps = self.steps_per_epoch * self.train.epochs
        self.memory_format = torch.channels_last if self.train.channels_last else torch.contiguous_format
        self.evaluation_files = SplitFiles(job.dataset, self.manifest, self.train.evaluate_on, job.reader)

        statistics = self.manifest.split("train")
        self.model = build_model(
            job.model,
            image_shape=self.manifest.image.shape,
            num_classes=len(self.manifest.classes),
            mean=statistics.mean,
            std=statistics.std,
            seed=self.train.seed,
        ).to(worker.device)
        self.model.to(memory_format=self.memory_format)  # type: ignore[call-overload]
        self.optimizer = make_optimizer(self.model, self.train)
        # Each rank keeps its own running statistics; `reduce_running_statistics` joins them for evaluation.
        self.forward: nn.Module = self.model
        if worker.world_size > 1:
            self.forward = DistributedDataParallel(
                self.model,
                device_ids=[worker.device.index] if worker.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_without_buffer_sync(),
            )
        self.progress = Progress()
        self.checkpoints = storage.join(job.folder, "checkpoints")
        self.checkpoint_path = ""
        self.identity = facts(job)
        self.events = EventWriter(storage.join(job.folder, "events"), worker.rank) if worker.rank == 0 else None
        self.attempt_steps = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=worker.device)
        self.loss_steps = 0

    def run(self) -> dict[str, Any]:
        self._restore()
        self._emit(
            "start",
            step=self.progress.step,
            total_steps=self.total_steps,
            epochs=self.train.epochs,
            force=True,
        )
        with Prefetch(self.feed.blocks(self.progress.step), self.feed.blocks_ahead) as ready:
            while self.progress.step < self.total_steps and not self.progress.diverged:
                self._epoch(ready)
                self._save()
        return self._result()

    def close(self) -> None:
        if self.events:
            self.events.flush()
        self.feed.close()
        self.evaluation_files.close()

    def _epoch(self, ready: Iterator[reader.Batch]) -> None:
        epoch, first_step = divmod(self.progress.step, self.steps_per_epoch)
        evaluate_after = {
            self.steps_per_epoch * part // self.train.evaluations_per_epoch
            for part in range(1, self.train.evaluations_per_epoch + 1)
        }
        for step_in_epoch in range(first_step, self.steps_per_epoch):
            self._step(ready)
            if self.progress.diverged or step_in_epoch + 1 in evaluate_after:
                self._evaluate(epoch)
            if self.progress.diverged:
                return

    def _step(self, batches: Iterator[reader.Batch]) -> None:
        """One optimizer step on one global batch; a loss that is not finite on any rank stops all before it."""
        started = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - started
        step = self.progress.step
        rate = self.train.learning_rate * learning_rate_factor(
            step,
            total_steps=self.total_steps,
            warmup_steps=round(self.train.warmup_epochs * self.steps_per_epoch),
        )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        loss = self._loss(batch, step)
        loss.backward()
        global_loss = self.worker.all_reduce_sum(loss.detach().double()) / self.worker.world_size
        if not torch.isfinite(global_loss):
            self.progress.diverged = True
            self._emit("diverged", step=step, learning_rate=rate, force=True)
            return
        self.optimizer.step()
        self.progress.step += 1
        self.loss_sum += global_loss
        self.loss_steps += 1
        self._time(started, waited)
        self._emit("step", step=self.progress.step, loss=float(global_loss), learning_rate=rate)

    def _loss(self, batch: reader.Batch, step: int) -> torch.Tensor:
        """Mean cross-entropy over this rank's part of the global batch; parts are of one size on all ranks."""
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
        ).contiguous(memory_format=self.memory_format)
        with torch.autocast(device.type, torch.bfloat16, enabled=self.train.bf16):
            logits = self.forward(images)
        return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.train.label_smoothing)

    def _time(self, started: float, waited: float) -> None:
        self.attempt_steps += 1
        if self.attempt_steps > WARM_UP_STEPS:
            self.progress.timed_images += self.train.batch_size
            self.progress.timed_seconds += time.perf_counter() - started
            self.progress.data_wait_seconds += waited

    def _evaluate(self, epoch: int) -> None:
        reduce_running_statistics(self.worker, self.model)
        batches = reader.evaluation_blocks(
            self.evaluation_files,
            rank=self.worker.rank,
            world_size=self.worker.world_size,
            batch_size=self.train.evaluation_batch_size,
            pin=self.feed.pin,
        )
        with Prefetch(batches) as ready:
            result = evaluate(
                self.worker,
                self.model,
                ready,
                split_rows=self.manifest.split(self.train.evaluate_on).rows,
                channels_last=self.train.channels_last,
            )
        step = self.progress.step
        train_loss = float(self.loss_sum) / self.loss_steps if self.loss_steps else None
        self.loss_sum.zero_()
        self.loss_steps = 0
        point = {
            "step": step,
            "epoch": step / self.steps_per_epoch,
            "accuracy": result.accuracy,
            "loss": result.loss if math.isfinite(result.loss) else None,  # JSON has no infinity
        }
        self.progress.curve.append(point)
        self.progress.train_loss.append(train_loss)
        self._emit(
            "evaluation",
            **point,
            train_loss=train_loss,
            split=self.train.evaluate_on,
            images_per_second=self._images_per_second(),
            force=True,
        )

    def _save(self) -> None:
        """Rank 0 writes; the others wait, so that no rank runs ahead of what a restart would find."""
        if self.worker.rank == 0:
            state = {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "progress": asdict(self.progress),
            }
            self.checkpoint_path = checkpoint.save(
                self.checkpoints,
                state,
                step=self.progress.step,
                identity=self.identity,
                keep=self.train.keep_checkpoints,
            )
        self.worker.wait_for_all()

    def _restore(self) -> None:
        """Rank 0 finds the newest whole checkpoint and the others load that very one, or fail."""
        identity, device = self.identity, self.worker.device
        state = None
        if self.worker.rank == 0:
            state = checkpoint.load_newest(self.checkpoints, identity=identity, device=device)
        found = torch.tensor(state["progress"]["step"] if state else 0, device=device)
        step = int(self.worker.all_reduce_sum(found))
        if step and self.worker.rank > 0:
            state = checkpoint.load_step(self.checkpoints, step, identity=identity, device=device)
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(**state["progress"])
            self.checkpoint_path = storage.join(self.checkpoints, f"step-{self.progress.step:08d}.pt")

    def _emit(self, kind: str, *, force: bool = False, **fields: Any) -> None:
        if self.events:
            self.events.emit(kind, **fields)
            if force:
                self.events.flush()

    def _images_per_second(self) -> float | None:
        seconds = self.progress.timed_seconds
        return self.progress.timed_images / seconds if seconds else None

    def _result(self) -> dict[str, Any]:
        progress = self.progress
        accuracies = [point["accuracy"] for point in progress.curve]
        seconds = progress.timed_seconds
        return {
            "best_accuracy": max(accuracies),
            "final_accuracy": accuracies[-1],
            "steps": progress.step,
            "images_per_second": self._images_per_second(),
            "data_wait_share": progress.data_wait_seconds / seconds if seconds else None,
            "diverged": progress.diverged,
            "curve": progress.curve,
            "train_loss": progress.train_loss,
            "checkpoint": self.checkpoint_path,
        }
