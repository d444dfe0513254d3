"""Our training loop against a bare loop of the same network on one GPU: bfloat16, channels_last, data on the device.

Contenders take turns, pass by pass, in one process, and each has batches of its own order from the same images. The
images are generated: noise is as fast as photographs. Neither Spark nor Java is needed. Without a GPU nothing is
measured; ``BENCH_DEVICE=cpu`` with small numbers in ``BENCH_BATCH`` and ``BENCH_STEPS`` shows that the benchmark works.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Result, compare, leave

sys.path.append(str(Path(__file__).parents[1] / "support"))

from small_shards import write_dataset

from models import build_model
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest, manifest, reader, versions
from pipeline.distributed.worker import alone
from pipeline.training.job import Job

PASSES = int(os.environ.get("BENCH_PASSES", "9"))
DEVICE = os.environ.get("BENCH_DEVICE", "cuda")
SCALE = int(os.environ.get("BENCH_BATCH", "1024")) / 1024  # of all batches
STEPS = int(os.environ.get("BENCH_STEPS", "100"))  # of a pass; one more pass goes before the first and is not counted
SHARDS = 16
BARE, GRAPHED = "bare loop", "bare loop, a CUDA graph"
STAGED, READER = "sparknorm", "sparknorm, with its reader"
COMPILED, BY_LANE = "sparknorm, compiled", "sparknorm, statistics of 16 lanes"
RECORDED, RECORDED_READER = "sparknorm, CUDA graphs", "sparknorm, CUDA graphs, with its reader"
RECORDED_BY_LANE = "sparknorm, CUDA graphs, statistics of 16 lanes"
BY_LANE_AGAINST = ((BY_LANE, STAGED), (RECORDED_BY_LANE, RECORDED))
EPOCHS = "sparknorm, whole epochs with evaluation and saves"

Take = Callable[[], None]
Speeds = dict[str, list[float]]


@dataclass(frozen=True)
class Case:
    """A network, and what it is trained on.

    images : in all; a multiple of the shards
    steps : of a pass, as a share of all
    """

    name: str
    model: ModelSettings
    batch: int
    images: int
    shape: tuple[int, int, int] = (1, 28, 28)
    steps: float = 1.0

    def job(self, dataset: str, folder: Path, *, epochs: int = 1000, **changes: Any) -> Job:
        train = {name: changes.pop(name) for name in ("compile", "cuda_graphs") if name in changes}
        return Job(
            str(Path(dataset).absolute()),
            str(folder.absolute()),
            self.model.model_copy(update=changes),
            TrainSettings(
                batch_size=self.batch_size, epochs=epochs, bf16=True, channels_last=True, log_every_steps=10,
                evaluation_batch_size=1000, **train,
            ),
        )  # fmt: skip

    @property
    def batch_size(self) -> int:
        return max(16, int(self.batch * SCALE))


RESNET8 = ModelSettings(network="resnet", depth=8, width=64)
LARGE = Case("ResNet-8, batch 1024", RESNET8, 1024, 61440)
SMALL = Case("ResNet-8, batch 128", RESNET8, 128, 61440, steps=2)
DEEP = Case(
    "ResNet-56, 32 px, batch 512", ModelSettings(network="resnet", depth=56, width=64), 512, 16384, (3, 32, 32), 0.2
)
PHOTOGRAPHS = Case("ResNet-50, 224 px, batch 256", ModelSettings(network="resnet50"), 256, 2048, (3, 224, 224), 0.2)


def is_there() -> bool:
    if DEVICE == "cuda" and not torch.cuda.is_available():
        print("gpu: no GPU here, nothing is measured")
        return False
    return True


def run(work: Path) -> None:
    torch.backends.cudnn.benchmark = True
    folder = work / "gpu"
    shutil.rmtree(folder, ignore_errors=True)
    results, pairs = [], []
    try:
        for case in (LARGE, SMALL, DEEP, PHOTOGRAPHS):
            speeds, held = _measure(case, folder)
            results += [Result(f"{case.name}: {name}", "images/s", passes) for name, passes in speeds.items()]
            results.append(Result(f"{case.name}: GPU memory held after the end", "MiB", [held]))
            against = [(name, BARE) for name in speeds if name != BARE]
            graphed = [(name, GRAPHED) for name in (STAGED, RECORDED, RECORDED_READER)]
            against += [pair for pair in (*graphed, *BY_LANE_AGAINST) if set(pair) <= speeds.keys()]
            pairs += [(f"{case.name}: {name}", f"{case.name}: {other}") for name, other in against]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    leave("gpu", results + [compare(results, *pair) for pair in pairs], f"bf16, channels_last, {device}")


def _measure(case: Case, folder: Path) -> tuple[Speeds, float]:
    """Images a second of each contender, and MiB of GPU memory that are held when all are gone.

    The first case also counts what cuBLAS keeps for the next, some 65 MiB.
    """
    dataset = _dataset(case, folder)
    before = _held()
    speeds = _in_turn(case, dataset, folder)
    if case is LARGE:
        speeds[EPOCHS] = _epochs(case, dataset, folder)
    return speeds, (_held() - before) / (1 << 20)


def _dataset(case: Case, folder: Path) -> str:
    """Noise in splits ``train`` and, of an eighth of it, ``test``."""
    path = str(folder / f"{case.shape[-1]}-px")
    if not Path(path).exists():
        rows = case.images // SHARDS
        _, labels = write_dataset(path, [rows] * (SHARDS + SHARDS // 8), shape=case.shape, row_group_rows=rows // 4)
        found = load_manifest(path)
        splits = {
            "train": _part(found.split("train"), slice(0, SHARDS), labels[: case.images]),
            "test": _part(found.split("train"), slice(SHARDS, None), labels[case.images :]),
        }
        versions.publish(path, found.model_copy(update={"splits": splits}), replaced=found)
    return path


def _part(split: manifest.Split, shards: slice, labels: np.ndarray) -> manifest.Split:
    counts = tuple(np.bincount(labels, minlength=3).tolist())
    return split.model_copy(update={"shards": split.shards[shards], "rows": len(labels), "label_counts": counts})


def _in_turn(case: Case, dataset: str, folder: Path) -> Speeds:
    steps = max(2, int(STEPS * case.steps))
    with contextlib.ExitStack() as at_end:
        contenders = {
            BARE: _bare(case, graphed=False),
            STAGED: _ours(case, case.job(dataset, folder / "staged"), at_end),
            READER: _ours(case, case.job(dataset, folder / "reader"), at_end, staged=False),
        }
        if case is LARGE:
            for name, options in {
                BY_LANE: {"norm_statistics": "lane"},
                RECORDED: {"cuda_graphs": True},
                RECORDED_BY_LANE: {"norm_statistics": "lane", "cuda_graphs": True},
            }.items():
                contenders[name] = _ours(case, case.job(dataset, folder / name, **options), at_end)
        elif case is SMALL and DEVICE == "cuda":
            contenders[COMPILED] = _ours(case, case.job(dataset, folder / "compiled", compile=True), at_end)
            for name, staged in ((RECORDED, True), (RECORDED_READER, False)):
                job = case.job(dataset, folder / f"recorded-{staged}", cuda_graphs=True)
                contenders[name] = _ours(case, job, at_end, staged=staged)
            contenders[GRAPHED] = _bare(case, graphed=True)
        speeds: Speeds = {name: [] for name in contenders}
        for number, (name, take) in itertools.product(range(PASSES + 1), contenders.items()):
            seconds = _seconds(take, steps)
            if number:
                speeds[name].append(steps * case.batch_size / seconds)
    return speeds


def _seconds(take: Take, steps: int) -> float:
    _synchronize()
    started = time.perf_counter()
    for _ in range(steps):
        take()
    _synchronize()
    return time.perf_counter() - started


def _synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def _held() -> int:
    gc.collect()
    _synchronize()
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def _ours(case: Case, job: Job, at_end: contextlib.ExitStack, *, staged: bool = True) -> Take:
    """A step of `fit`'s own loop, with all that it does for each."""
    from pipeline.training.assembly import assemble

    training = at_end.enter_context(assemble(alone(DEVICE), job))
    training.step.warm_up()
    training.checkpoints.restore()
    read = _on_device(case) if staged else at_end.enter_context(training.loader.batches(0))
    batches = read if staged else training.step.data.ahead(read)

    def take() -> None:
        training.step.take(batches)

    return take


def _epochs(case: Case, dataset: str, folder: Path) -> list[float]:
    """Images a second of whole epochs of `fit`: from one evaluation to the next, with the save between them."""
    from pipeline.training.loop import fit

    ends: list[float] = []

    def note(moment: Any) -> None:
        if moment.name == "after_evaluation":
            ends.append(time.perf_counter())

    job = case.job(dataset, folder / "epochs", epochs=PASSES + 1)
    fit(alone(DEVICE), Job(job.dataset, job.folder, job.model, job.train, hook=note))
    steps = case.images // case.batch_size
    return [steps * case.batch_size / (end - begin) for begin, end in itertools.pairwise(ends)]


def _on_device(case: Case) -> Iterator[reader.Batch]:
    """Batches of images that lie on the device, in a new random order for each pass over them."""
    images = torch.randint(0, 256, (case.images, *case.shape), dtype=torch.uint8, device=DEVICE)
    labels = torch.randint(0, 3, (case.images,), device=DEVICE)
    while True:
        order = torch.randperm(case.images, device=DEVICE)
        for rows in order[: case.images // case.batch_size * case.batch_size].split(case.batch_size):
            yield reader.Batch(images[rows], labels[rows])


def _bare(case: Case, *, graphed: bool) -> Take:
    """What a person would write by hand for one GPU: no look at the loss, a fused optimizer, nothing on the way."""
    train, batches = TrainSettings(), _on_device(case)
    model = build_model(case.model, image_shape=case.shape, num_classes=3)
    model.to(DEVICE).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=train.momentum, nesterov=True, weight_decay=train.weight_decay, fused=True
    )

    def step(batch: reader.Batch) -> None:
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(batch.images.contiguous(memory_format=torch.channels_last))
        torch.nn.functional.cross_entropy(logits.float(), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return _graph(step, batches) if graphed else lambda: step(next(batches))


def _graph(step: Callable[[reader.Batch], None], batches: Iterator[reader.Batch]) -> Take:
    """The launches of a step, recorded once; each batch is copied to where the recorded one was."""
    held = reader.Batch(*(tensor.clone() for tensor in next(batches)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(held)

    def take() -> None:
        assert step, "network and optimizer, whose memory the graph writes to, live as long as it does"
        for mine, theirs in zip(held, next(batches), strict=True):
            mine.copy_(theirs)
        graph.replay()

    return take


if __name__ == "__main__":
    if is_there():
        run(Path("runs/bench/work"))
