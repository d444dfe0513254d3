"""A device without memory for a training, as an error that says what to change."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from pipeline.config.training import TrainSettings
from pipeline.distributed.device import describe_memory
from pipeline.distributed.worker import Worker

# In what torch raises where the system gives it no memory for a tensor on CPU.
_CPU_ALLOCATOR = "DefaultCPUAllocator"


class OutOfMemoryError(RuntimeError):
    """The memory of a rank's device is not enough for its part of a batch."""

    final = True  # the same batch would not fit after another launch


@contextmanager
def explain_out_of_memory(worker: Worker, train: TrainSettings) -> Iterator[None]:
    """Turn torch's error about memory, raised in the block, into an `OutOfMemoryError`.

    Parameters
    ----------
    train : with the global batch of the whole training
    """
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, torch.cuda.OutOfMemoryError) or _CPU_ALLOCATOR in str(error)):
            raise
        position, reason = worker.status.position, str(error).partition("\n")[0]
        evaluates = position.phase == "evaluation"
        rows = train.global_batch // worker.world_size
        at_once = train.evaluation_batch_size if evaluates else rows // train.accumulate
        ways = [f"lower train.evaluation_batch_size ({at_once})"] if evaluates else _ways(train, rows, worker.device)
        if worker.device.type == "cuda":
            ways.insert(1, "set reader.gpu_bytes=0, so that no images of evaluations stay on the GPU")
        raise OutOfMemoryError(
            f"out of memory on rank {worker.rank} of {worker.world_size}, {socket.gethostname()}, {worker.device} "
            f"({describe_memory(worker.device)}), with {at_once} images at once in {position}: {', or '.join(ways)} "
            f"({reason})"
        ) from error


def _ways(train: TrainSettings, rows: int, device: torch.device) -> list[str]:
    """What would make the steps take less memory.

    Parameters
    ----------
    rows : of this rank in each global batch
    """
    more = next((parts for parts in range(train.accumulate + 1, rows + 1) if rows % parts == 0), None)
    ways = []
    if more is not None:
        ways.append(f"raise train.accumulate from {train.accumulate} to {more}, which leaves the result as it is but "
                    "for norm statistics")  # fmt: skip
    if device.type == "cuda" and not train.bf16:
        ways.append("set train.bf16=true")
    if not (train.gradient_checkpointing or train.compile or train.cuda_graphs):
        ways.append("set train.gradient_checkpointing=true")
    ways.append(f"lower train.batch_size ({train.global_batch})")
    ways.append("use more workers or a smaller network")
    return ways
