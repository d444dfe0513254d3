"""One rank: who it is, its device, its process group. No Spark here.

A barrier task of Spark makes one for its rank; `alone()` is a world of one and `from_torchrun()` reads the environment
that torchrun sets, so the same training code runs on a bare GPU machine.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Its functions take the group that is joined when it is imported for a default, and would keep it, with its connections
# and NCCL's memory, as long as the process lives. DistributedDataParallel imports it: so it is imported before.
import torch.distributed.nn.functional

from pipeline.distributed.device import choose_device, try_device
from pipeline.distributed.interfaces import Endpoint
from pipeline.distributed.leave import leave_process_group
from pipeline.telemetry.heartbeat import Status

_RETHROW = "TORCH_NCCL_RETHROW_CUDA_ERRORS"


@dataclass(frozen=True)
class Worker:
    """One rank, as a training function sees it: which one it is, its device, and the collectives over all ranks.

    rank, world_size : number of this process, from 0, and of all of them
    local_rank, local_world_size : the same among the processes of its host
    device : where the model and the batches live
    host : name of the host
    gpu : the address of the GPU that Spark assigned, if it assigned one
    endpoint : at which address, and on which network interface, other ranks reach this one; None where nobody knows
    attempt : number of this gang among those started for the same job, from 1
    status : where this rank says what it is doing
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    device: torch.device
    host: str
    gpu: str | None = None
    endpoint: Endpoint | None = None
    attempt: int = 1
    status: Status = field(default_factory=Status, compare=False)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks, in place; the tensor must have the same shape and dtype on every rank."""
        if self.world_size > 1:
            dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
        return tensor

    def all_reduce_start(self, tensor: torch.Tensor) -> dist.Work | None:
        """Begin `all_reduce_sum`: the tensor holds the sum after ``wait()`` of what is returned. None if alone."""
        return dist.all_reduce(tensor, op=dist.ReduceOp.SUM, async_op=True) if self.world_size > 1 else None

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in rank order, on every rank. A value is small, and anything that pickles."""
        values: list[Any] = [value] * self.world_size
        if self.world_size > 1:
            with self.status.waiting():
                dist.all_gather_object(values, value)
        return values

    def gather_on_first(self, value: Any) -> list[Any] | None:
        """The values of all ranks in rank order, on rank 0; None on the others. A value is anything that pickles."""
        if self.world_size == 1:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        with self.status.waiting():
            dist.gather_object(value, values, dst=0)
        return values

    def wait_for_all(self) -> None:
        """Return once every rank is here, or raise after the collective timeout."""
        if self.world_size > 1:
            with self.status.waiting():
                dist.barrier(device_ids=[self.device.index or 0] if dist.get_backend() == "nccl" else None)


def alone(device: str = "auto") -> Worker:
    """A world of one, without a process group."""
    chosen = choose_device(device, None, 0)
    try_device(chosen, rank=0)
    return Worker(0, 1, 0, 1, chosen, socket.gethostname())


def default_backend(device: torch.device) -> str:
    """What ranks on such a device speak through, in torch's words."""
    return "nccl" if device.type == "cuda" else "gloo"


@contextmanager
def process_group(
    store: dist.Store,
    rank: int,
    world_size: int,
    device: torch.device,
    timeout: timedelta,
    *,
    backend: str | None = None,
    endpoint: Endpoint | None = None,
) -> Iterator:
    """Join the default process group and leave it at the end, whatever happens, within a bound (see `leave`). Memory
    that torch keeps on a GPU for later is then given back: a process may live on, with nothing to train.

    An error that leaves the block is given a note that says on which rank, host and device it was raised.

    Parameters
    ----------
    backend : None is NCCL on CUDA and gloo on CPU. gloo also takes tensors of a GPU, and lets ranks share one
    endpoint : its interface carries the group's traffic, unless the user has set GLOO_SOCKET_IFNAME or
        NCCL_SOCKET_IFNAME; None leaves the choice to gloo and NCCL
    """
    backend = backend or default_backend(device)
    # As long as the group is there: NCCL connects when it is used first.
    with endpoint.used() if endpoint is not None else nullcontext(), _watchdog_that_lets_errors_out():
        dist.init_process_group(
            backend,
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=device if backend == "nccl" else None,
        )
        try:
            yield
        except BaseException as error:
            error.add_note(f"raised on rank {rank} of {world_size}, {socket.gethostname()}, {device}")
            leave_process_group(device, error)
            raise
        leave_process_group(device, None)


@contextmanager
def _watchdog_that_lets_errors_out() -> Iterator[None]:
    """Keep NCCL's watchdog from ending the process at an error of CUDA or of a peer: Python raises the first, and the
    rank that has failed reports the second. Who has set the variable decides for himself.

    A rank that hangs ends by the driver, which watches its heartbeats, or else by NCCL's own monitor, 8 minutes after
    its watchdog has given up (TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC).
    """
    if _RETHROW in os.environ:
        yield
        return
    os.environ[_RETHROW] = "0"
    try:
        yield
    finally:
        os.environ.pop(_RETHROW, None)


@contextmanager
def from_torchrun(device: str = "auto", timeout_seconds: float = 300) -> Iterator[Worker]:
    """The worker that torchrun's environment describes, with its process group joined."""
    env = {name: int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    chosen = choose_device(device, None, env["LOCAL_RANK"])
    try_device(chosen, env["RANK"])
    timeout = timedelta(seconds=timeout_seconds)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=env["RANK"] == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timeout,
    )
    with process_group(store, env["RANK"], env["WORLD_SIZE"], chosen, timeout):
        yield Worker(
            env["RANK"],
            env["WORLD_SIZE"],
            env["LOCAL_RANK"],
            env["LOCAL_WORLD_SIZE"],
            chosen,
            socket.gethostname(),
        )
