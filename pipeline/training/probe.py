"""What one worker of `doctor` reports of its host: versions, storage, disk, and its connection to the other workers."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from pipeline import storage
from pipeline.data import jpeg, load_manifest
from pipeline.distributed.gpu_facts import GpuFacts, gpu_facts
from pipeline.distributed.worker import Worker

# About what the gradients of a small network take.
_EXCHANGED_BYTES = 4 << 20

T = TypeVar("T")


@dataclass(frozen=True)
class ProbeTask:
    """What every worker is asked.

    folder : where all workers must be able to write
    token : what the driver wrote into the file ``driver`` there
    dataset, version : the dataset to look at; None is the newest version
    """

    folder: str
    token: str
    dataset: str
    version: int | None


@dataclass(frozen=True)
class WorkerReport:
    """What one worker saw.

    python : its version
    device : what it would train on, in torch's words
    gpu : the address of the GPU that Spark assigned; None where it assigned none
    digest : of the dataset's manifest; None where it could not be read
    output_free_bytes : of the disk with the folder; None where that cannot be known
    local_free_bytes : of the disk with temporary files
    exchange_seconds : of one all-reduce of 4 MiB over all workers, the median of 5
    endpoint : address and network interface at which other workers reach it; None where nobody knows
    problems : what failed, one text each
    gpu_facts : what it sees of its GPU; None on CPU
    without_simplejpeg : why Pillow decodes every JPEG image there; None where it does not
    """

    rank: int
    host: str
    python: str
    device: str
    gpu: str | None
    digest: str | None
    output_free_bytes: int | None
    local_free_bytes: int
    exchange_seconds: float
    problems: tuple[str, ...]
    endpoint: str | None = None
    gpu_facts: GpuFacts | None = None
    without_simplejpeg: str | None = None


def probe(worker: Worker, task: ProbeTask) -> WorkerReport:
    """Make every check of a worker, and report what fails instead of ending there: one run shows all that is wrong."""
    problems: list[str] = []
    _report_error(problems, lambda: _check_storage(worker, task))
    worker.wait_for_all()
    _report_error(problems, lambda: _check_others(worker, task))
    return WorkerReport(
        rank=worker.rank,
        host=worker.host,
        python=platform.python_version(),
        device=str(worker.device),
        gpu=worker.gpu,
        digest=_report_error(problems, lambda: load_manifest(task.dataset, task.version).digest),
        output_free_bytes=storage.free_bytes(task.folder),
        local_free_bytes=shutil.disk_usage(tempfile.gettempdir()).free,
        exchange_seconds=_exchange_seconds(worker),
        problems=tuple(problems),
        endpoint=str(worker.endpoint) if worker.endpoint is not None else None,
        gpu_facts=gpu_facts(worker),
        without_simplejpeg=None if (found := jpeg.decoder()).decode is not None else found.detail,
    )


def _report_error(problems: list[str], check: Callable[[], T]) -> T | None:
    try:
        return check()
    except OSError as error:
        problems.append(f"{type(error).__name__}: {error}")
    except ValueError as error:  # a DatasetError too
        problems.append(str(error))
    return None


def _check_storage(worker: Worker, task: ProbeTask) -> None:
    storage.check_seen(storage.join(task.folder, "driver"), task.token, writer="the driver")
    storage.check_replaces(storage.join(task.folder, f"rank-{worker.rank}"), f"{task.token} {worker.rank}")


def _check_others(worker: Worker, task: ProbeTask) -> None:
    for rank in range(worker.world_size):
        path = storage.join(task.folder, f"rank-{rank}")
        storage.check_seen(path, f"{task.token} {rank}", writer=f"rank {rank}")


def _exchange_seconds(worker: Worker) -> float:
    times = []
    for _ in range(5):
        buffer = torch.zeros(_EXCHANGED_BYTES // 4, device=worker.device)
        started = time.perf_counter()
        worker.all_reduce_sum(buffer).sum().item()
        times.append(time.perf_counter() - started)
    return sorted(times)[2]
