"""Our training loop against a bare loop on one GPU: ResNet-8, bfloat16, channels_last, batch 1024 of Fashion-MNIST.

Both begin with the data on the device, as hand-tuned loops do; a third contender is our loop with its own reader, from
shards in the host's memory. They take turns, pass by pass, in one process. Without a GPU nothing is measured;
``BENCH_DEVICE=cpu BENCH_BATCH=64`` shows that the benchmark itself works.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from results import Result, compare, console, leave
from training import _in_memory

from models import build_model
from pipeline.config.training import ModelSettings, TrainSettings
from pipeline.data import reader
from pipeline.distributed.worker import alone
from pipeline.training.job import Job

PASSES = int(os.environ.get("BENCH_PASSES", "9"))
BATCH = int(os.environ.get("BENCH_BATCH", "1024"))
DEVICE = os.environ.get("BENCH_DEVICE", "cuda")
STEPS = int(os.environ.get("BENCH_STEPS", "100"))  # of a pass; one more pass goes before the first and is not counted
MODEL = ModelSettings(network="resnet", depth=8, width=64)
OURS, BARE = "sparknorm, data on the device", "bare loop, data on the device"
READER = "sparknorm, with its reader"


def is_there() -> bool:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        console.print("gpu: no GPU here, nothing is measured")
        return False
    return True


def run(dataset: str, work: Path) -> None:
    torch.backends.cudnn.benchmark = True
    folder = work / "gpu"
    with contextlib.ExitStack() as at_end:
        at_end.callback(shutil.rmtree, folder, ignore_errors=True)
        contenders = {
            BARE: _bare(dataset),
            OURS: _ours(dataset, folder / "staged", at_end, staged=True),
            READER: _ours(dataset, folder / "reader", at_end, staged=False),
        }
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for number, (name, take) in itertools.product(range(PASSES + 1), contenders.items()):
            speed = _images_per_second(take)
            if number:
                speeds[name].append(speed)
    results = [Result(name, "images/s", passes) for name, passes in speeds.items()]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    leave(
        "gpu",
        results + [compare(results, name, BARE) for name in (OURS, READER)],
        f"ResNet-8, bf16, channels_last, batch {BATCH}, {device}",
    )


def _images_per_second(take: Callable[[], None]) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(STEPS):
        take()
    _synchronize()
    return STEPS * BATCH / (time.perf_counter() - started)


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _ours(dataset: str, folder: Path, at_end: contextlib.ExitStack, *, staged: bool) -> Callable[[], None]:
    """A step of `fit`'s own loop, with all that it does for each."""
    from pipeline.training.assembly import assemble

    train = TrainSettings(batch_size=BATCH, epochs=1000, bf16=True, channels_last=True)
    job = Job(str(Path(dataset).absolute()), str(folder.absolute()), MODEL, train)
    training = at_end.enter_context(assemble(alone(DEVICE), job))
    training.step.warm_up()
    training.checkpoints.restore()
    if staged:
        images, labels, _ = _in_memory(dataset)
        batches: Any = _shuffled(images.to(DEVICE), labels.to(DEVICE))
    else:
        batches = at_end.enter_context(training.loader.batches(0))

    def take() -> None:
        training.step.take(batches)

    return take


def _shuffled(images: torch.Tensor, labels: torch.Tensor) -> Iterator[reader.Batch]:
    while True:
        order = torch.randperm(len(images), device=images.device)
        for rows in order[: len(order) // BATCH * BATCH].split(BATCH):
            yield reader.Batch(images[rows], labels[rows])


def _bare(dataset: str) -> Callable[[], None]:
    """What a person would write by hand for one GPU: no look at the loss, a fused optimizer, nothing on the way."""
    images, labels, found = _in_memory(dataset)
    split, train = found.split("train"), TrainSettings()
    model = build_model(MODEL, image_shape=found.image.shape, num_classes=10, mean=split.mean, std=split.std)
    model.to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=train.momentum, nesterov=True, weight_decay=train.weight_decay, fused=True
    )
    batches = _shuffled(images.to(DEVICE), labels.to(DEVICE))

    def take() -> None:
        batch = next(batches)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(batch.images.contiguous(memory_format=torch.channels_last))
        loss = torch.nn.functional.cross_entropy(logits.float(), batch.labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    return take
