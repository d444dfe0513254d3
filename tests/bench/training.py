"""Launching and training: our barrier stage against TorchDistributor, a worker against a bare loop over tensors in
memory, two workers against one, and what a killed worker costs. Real trainings of Fashion-MNIST on Spark's local[2].

Contenders take turns, pass by pass. Every rank has one torch thread.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import shutil
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import Result, compare, leave

from pipeline.cluster import barrier
from pipeline.config.cluster import SparkSettings, WorkerSettings
from pipeline.config.dataset import ReaderSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.data import load_manifest
from pipeline.data.shards import SplitFiles
from pipeline.telemetry.events import EventReader
from pipeline.telemetry.heartbeat import read_beat
from pipeline.training.job import Job, facts

LAUNCHES = int(os.environ.get("BENCH_LAUNCHES", "7"))
PASSES = int(os.environ.get("BENCH_PASSES", "7"))
KILLS = int(os.environ.get("BENCH_KILLS", "7"))
# Steps of a pass, and of the part at its start that is not counted.
STEPS, UNCOUNTED = 110, 10
BATCH = 256  # over all workers
OURS, DISTRIBUTOR = "sparknorm, launch to first step, 2 ranks", "TorchDistributor, launch to first step, 2 ranks"
ONE, BARE = "sparknorm, 1 worker", "bare loop, tensors in memory"
OURS_IN_TURN, BARE_IN_TURN = "sparknorm, 1 worker, 3 steps in turn", "bare loop, 3 steps in turn, same process"
TWO, TWICE = "sparknorm, 2 workers", "twice 1 worker"
BARE_PAIR = "limit: 2 bare loops side by side"
BARE_IN_STEP = "limit: 2 bare loops that wait for each other at every step"
RESTART = "sparknorm, SIGKILL of a worker to its first new step"


def start(master: str = "local[2]") -> Any:
    from pipeline.cluster.session import get_session

    return get_session(SparkSettings(master=master), "sparknorm benchmarks", trains=True)


def run(spark: Any, dataset: str, work: Path) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    folder = work / "trainings"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that did not get to its end
    seconds = launches(spark, dataset, folder)
    speeds = throughputs(spark, dataset, folder) | in_turn(spark, dataset, folder)
    lost = [restart(spark, dataset, folder / f"kill-{number}") for number in range(KILLS)]
    shutil.rmtree(folder, ignore_errors=True)
    speeds[TWICE] = [2 * speed for speed in speeds[ONE]]
    results = [Result(name, "s", passes) for name, passes in seconds.items()]
    results += [Result(RESTART, "s", lost)]
    results += [Result(name, "images/s", passes) for name, passes in speeds.items()]
    pairs = (
        (OURS, DISTRIBUTOR),
        (ONE, BARE),
        (OURS_IN_TURN, BARE_IN_TURN),
        (TWO, TWICE),
        (TWO, BARE_PAIR),
        (TWO, BARE_IN_STEP),
    )
    leave("training", results + [compare(results, *pair) for pair in pairs], "training on local[2], 1 thread a rank")


def make_job(dataset: str, folder: Path, **changes: Any) -> Job:
    when = CheckpointSettings(every_steps=changes.pop("every_steps", None))
    return Job(
        str(Path(dataset).absolute()),
        str(folder.absolute()),
        ModelSettings(),
        TrainSettings(epochs=3, batch_size=BATCH, **changes),
        checkpoint=when,
    )


def first_step(worker: Any, job: Job) -> float:
    """The beginning of `fit`, up to the end of its first step: the time then (time.time())."""
    with _steps(worker, job) as (step, batches):
        step.take(batches)
        return time.time()


@contextlib.contextmanager
def _steps(worker: Any, job: Job) -> Iterator[tuple[Any, Any]]:
    """The step of `fit` and its batches, from the first one on."""
    from pipeline.training.assembly import assemble

    with assemble(worker, job) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        with training.loader.batches(0) as batches:
            yield training.step, batches


def first_step_of_torchrun(job: Job) -> float:
    """The same, launched by TorchDistributor, which runs torchrun in every task."""
    from pipeline.distributed.worker import from_torchrun

    with from_torchrun("cpu") as worker:
        return first_step(worker, job)


def launches(spark: Any, dataset: str, folder: Path) -> dict[str, list[float]]:
    """Seconds from the call to the end of the first step, in a session in which both have run once."""
    from pyspark.ml.torch.distributor import TorchDistributor

    def ours() -> float:
        job = make_job(dataset, folder / "launch")
        options = {"workers": WorkerSettings(count=2), "facts": facts, "folder": job.folder}
        return max(barrier.run(spark, first_step, (job,), **options))

    def distributor() -> float:
        peer = TorchDistributor(num_processes=2, local_mode=False, use_gpu=False)
        return float(peer.run(first_step_of_torchrun, make_job(dataset, folder / "launch")))

    seconds: dict[str, list[float]] = {OURS: [], DISTRIBUTOR: []}
    for number in range(LAUNCHES + 1):
        for name, launch in ((OURS, ours), (DISTRIBUTOR, distributor)):
            shutil.rmtree(folder / "launch", ignore_errors=True)
            started = time.time()
            with Path(os.devnull).open("w") as silence, contextlib.redirect_stdout(silence):
                done = launch()
            if number:
                seconds[name].append(done - started)
    return seconds


def throughputs(spark: Any, dataset: str, folder: Path) -> dict[str, list[float]]:
    """Images per second of training steps; evaluation, start and the first steps left out."""

    def train(count: int) -> Callable[[], float]:
        def go() -> float:
            job = make_job(dataset, folder / "speed")
            return min(
                barrier.run(spark, _speed, (job,), workers=WorkerSettings(count=count), facts=facts, folder=job.folder)
            )

        return go

    contenders = {
        ONE: train(1),
        BARE: lambda: _bare(dataset, 1),
        TWO: train(2),
        BARE_PAIR: lambda: _bare(dataset, 2),
        BARE_IN_STEP: lambda: _bare(dataset, 2, BATCH // 2, in_step=True),
    }
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(PASSES):
        for name, contender in contenders.items():
            shutil.rmtree(folder / "speed", ignore_errors=True)
            speeds[name].append(contender())
    return speeds


def _speed(worker: Any, job: Job) -> float:
    """Images per second of the first steps of `fit`, its own loop with all that it does for each step."""
    with _steps(worker, job) as (step, batches):
        for number in range(STEPS):
            if number == UNCOUNTED:
                started = time.perf_counter()
            step.take(batches)
        seconds = time.perf_counter() - started
    return (STEPS - UNCOUNTED) * job.train.global_batch / seconds


def in_turn(spark: Any, dataset: str, folder: Path) -> dict[str, list[float]]:
    """`ONE` and `BARE`, three steps of each in turn in one barrier worker: a noisy machine is noisy to both."""
    job = make_job(dataset, folder / "turn")
    options = {"workers": WorkerSettings(count=1), "facts": facts, "folder": job.folder}
    (speeds,) = barrier.run(spark, _in_turn, (job,), **options)
    return speeds


def _in_turn(worker: Any, job: Job) -> dict[str, list[float]]:
    bare_step = _bare_step(job.dataset)
    speeds: dict[str, list[float]] = {OURS_IN_TURN: [], BARE_IN_TURN: []}
    with _steps(worker, job) as (step, batches):
        for turn in range(2 * STEPS // 3):
            for name, take in ((OURS_IN_TURN, lambda _: step.take(batches)), (BARE_IN_TURN, bare_step)):
                started = time.perf_counter()
                for number in range(3 * turn, 3 * turn + 3):
                    take(number)
                if turn > UNCOUNTED // 3:
                    speeds[name].append(3 * job.train.global_batch / (time.perf_counter() - started))
    return speeds


def _bare(dataset: str, count: int, batch: int = BATCH, *, in_step: bool = False) -> float:
    """Images per second of so many processes at once, each with a loop of its own, in sum.

    in_step : they exchange nothing, but wait for each other at every step, as any synchronous training has to
    """
    context = multiprocessing.get_context("spawn")
    gate = context.Barrier(count)
    with context.Pool(count, initializer=_open_gate, initargs=(gate,)) as pool:
        return sum(pool.starmap_async(_bare_loop, [(dataset, batch, in_step)] * count, chunksize=1).get(timeout=600))


def _open_gate(gate: Any) -> None:
    globals()["GATE"] = gate


def _bare_loop(dataset: str, batch: int = BATCH, in_step: bool = False) -> float:
    torch.set_num_threads(1)
    take = _bare_step(dataset, batch)
    GATE.wait(timeout=300)  # noqa: F821 - made by the initializer
    for step in range(STEPS):
        if step == UNCOUNTED:
            started = time.perf_counter()
        take(step)
        if in_step:
            GATE.wait(timeout=300)  # noqa: F821
    return (STEPS - UNCOUNTED) * batch / (time.perf_counter() - started)


def _bare_step(dataset: str, batch: int = BATCH) -> Callable[[int], None]:
    """What a person would write by hand: one tensor of all images, a permutation, SGD; same network, same settings."""
    from models import build_model

    images, labels, found = _in_memory(dataset)
    train = TrainSettings(batch_size=BATCH)
    split = found.split("train")
    model = build_model(ModelSettings(), image_shape=found.image.shape, num_classes=10, mean=split.mean, std=split.std)
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=train.momentum, nesterov=True, weight_decay=train.weight_decay
    )
    order = torch.randperm(len(images))

    def take(step: int) -> None:
        first = step * batch % (len(images) - batch)
        rows = order[first : first + batch]
        inputs = torch.index_select(images, 0, rows).contiguous(memory_format=torch.channels_last)
        loss = torch.nn.functional.cross_entropy(model(inputs), labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        loss.item()

    return take


def _in_memory(dataset: str) -> tuple[torch.Tensor, torch.Tensor, Any]:
    found = load_manifest(dataset)
    with contextlib.closing(SplitFiles(dataset, found, "train", ReaderSettings(verify="off"))) as files:
        groups = [files.read(number, 0, int(rows)) for number, rows in enumerate(files.group_rows)]
    images, labels = (np.concatenate(parts) for parts in zip(*groups, strict=True))
    return torch.from_numpy(images), torch.from_numpy(labels).long(), found


def restart(spark: Any, dataset: str, folder: Path) -> float:
    """Seconds from the SIGKILL of rank 1 until the gang has made a new step, the time of a step left out."""
    job = make_job(dataset, folder, every_steps=10)
    killed: list[float] = []

    def kill() -> None:
        while not killed:
            time.sleep(0.05)
            with contextlib.suppress(FileNotFoundError):
                beat = read_beat(job.folder, 1)
                if beat.step > 30 and not beat.ended:
                    killed.append(time.time())
                    os.kill(beat.pid, signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    options = {"workers": WorkerSettings(count=2), "facts": facts, "folder": job.folder}
    barrier.run(spark, _some_steps, (job,), limit_seconds=300, **options)
    steps = [event for event in EventReader(str(folder / "events")).new() if event["kind"] == "step"]
    after = [event["time"] for event in steps if event["time"] > killed[0] + 0.5]
    step_seconds = statistics.median(late - early for early, late in itertools.pairwise(after))
    return after[0] - killed[0] - step_seconds


def _some_steps(worker: Any, job: Job) -> int:
    """`fit` for 80 steps, with its checkpoints."""
    from pipeline.training.assembly import assemble

    with assemble(worker, job) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        progress, loader = training.state.progress, training.loader
        with loader.batches(progress.step) as batches:
            while progress.step < 80:
                if training.step.take(batches):
                    training.checkpoints.save()
        training.checkpoints.finish()
        return progress.step
