"""What one worker of a preflight finds out about its host: versions, storage, disk, the way to the other workers."""

from __future__ import annotations

import platform
import shutil
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import torch

from pipeline import storage
from pipeline.data.manifest import DatasetError
from pipeline.data.manifest import load as load_manifest
from pipeline.distributed.worker import Worker

# About what the gradients of a small network take.
_EXCHANGED_BYTES = 4 << 20


@dataclass(frozen=True)
class Task:
    """folder : where all workers must be able to write; token : what the driver wrote into ``driver`` there"""

    folder: str
    token: str
    dataset: str
    version: int | None


def probe(worker: Worker, task: Task) -> dict[str, Any]:
    """Everything is tried, and what fails is told, so that one run shows all that is wrong.

    Returns
    -------
    dict
        rank, host, python, device, gpu, problems (a list of texts), free_bytes (of the folder and of the local disk,
        None where it cannot be known), digest (of the dataset), exchange_seconds (one all-reduce of 4 MiB, median of 5)
    """
    problems: list[str] = []
    _try(problems, lambda: _check_storage(worker, task))
    worker.wait_for_all()
    _try(problems, lambda: _check_others(worker, task))
    return {
        "rank": worker.rank,
        "host": worker.host,
        "python": platform.python_version(),
        "device": str(worker.device),
        "gpu": worker.gpu,
        "digest": _try(problems, lambda: load_manifest(task.dataset, task.version).digest),
        "free_bytes": {
            "output": storage.free_bytes(task.folder),
            "local": shutil.disk_usage(tempfile.gettempdir()).free,
        },
        "exchange_seconds": _exchange_seconds(worker),
        "problems": problems,
    }


def _try(problems: list[str], look: Any) -> Any:
    try:
        return look()
    except (OSError, DatasetError, ValueError) as error:
        problems.append(f"{type(error).__name__}: {error}" if isinstance(error, OSError) else str(error))
        return None


def _check_storage(worker: Worker, task: Task) -> None:
    """Raise where this worker does not see what the driver wrote, or cannot publish and replace a file."""
    path = storage.join(task.folder, "driver")
    if not storage.exists(path) or storage.read_bytes(path).decode() != task.token:
        raise ValueError(f"{path}, written by the driver, is not seen here: set `output` to a place that all share")
    storage.check_replaces(storage.join(task.folder, f"rank-{worker.rank}"), f"{task.token} {worker.rank}")


def _check_others(worker: Worker, task: Task) -> None:
    for rank in range(worker.world_size):
        path = storage.join(task.folder, f"rank-{rank}")
        if not storage.exists(path) or storage.read_bytes(path).decode() != f"{task.token} {rank}":
            raise ValueError(
                f"{path}, written by rank {rank}, is not seen here: set `output` to a place that all share"
            )


def _exchange_seconds(worker: Worker) -> float:
    times = []
    for _ in range(5):
        buffer = torch.zeros(_EXCHANGED_BYTES // 4, device=worker.device)
        started = time.perf_counter()
        worker.all_reduce_sum(buffer).sum().item()
        times.append(time.perf_counter() - started)
    return sorted(times)[2]
