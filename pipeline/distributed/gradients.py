"""Averages gradients over the ranks while the backward pass still runs: DistributedDataParallel, and its clock."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.distributed.worker import Worker


class GradientExchange:
    """Makes the gradients of every rank those of the global batch, if forward passes go through ``forward``.

    Parameters
    ----------
    model : the bare network, on the device of this rank
    compression : "none", or "bf16": gradients are rounded to bfloat16, summed, and widened again

    Attributes
    ----------
    forward : the network wrapped in DistributedDataParallel; in a world of one the network itself
    """

    def __init__(self, worker: Worker, model: nn.Module, compression: str):
        self.forward: nn.Module = model
        clock = GpuClock() if worker.device.type == "cuda" and worker.world_size > 1 else None
        self._state = _HookState(worker, bf16=compression == "bf16", clock=clock)
        if worker.world_size > 1:
            self.forward = DistributedDataParallel(
                model,
                device_ids=[worker.device.index] if worker.device.type == "cuda" else None,
                gradient_as_bucket_view=True,
                **_without_buffer_sync(),
            )
            # DDP's reducer keeps the hook. Were that a method, it would keep this object, and with it network and
            # reducer, in a circle through C++ that no garbage collector sees: GPU memory would outlive the training.
            self.forward.register_comm_hook(self._state, _exchange)

    @property
    def ready_at(self) -> float:
        """time.perf_counter() when this rank had computed its last gradient; what follows in ``backward()`` is waiting.
        0 in a world of one."""
        return self._state.ready_at

    def waited_on_gpu(self) -> float:
        """Seconds that this rank's GPU waited for the gradients of others, after its own last one, in the backward pass
        before the newest. Call it once after each, and once the host knows that the newest forward pass is computed:
        then it waits for nothing. 0 on CPU, in a world of one, and in the first step."""
        return self._state.clock.seconds_before() if self._state.clock else 0.0

    def local(self) -> Any:
        """A context in which ``backward()`` adds to this rank's gradients and exchanges nothing."""
        return getattr(self.forward, "no_sync", contextlib.nullcontext)()

    def warm_up(self, loss: Callable[[], torch.Tensor]) -> None:
        """Make forward and backward passes without consequence. They change buffers, which the caller restores.

        DDP cuts its buckets anew after the first backward pass, in the order in which gradients came. Sums over three
        or more ranks depend on the cut, so that a restarted gang must not begin with another.

        Parameters
        ----------
        loss : a forward pass through ``forward``, as training makes it
        """
        if self._state.worker.world_size > 1:
            for _ in range(2):
                loss().backward()
                self.forward.zero_grad(set_to_none=True)


class GpuClock:
    """Times a GPU's wait for others by events on its stream, since the host, which runs ahead, sees none of it.

    Two pairs of events take turns: those of one pass are read in the next, when they have long happened.
    """

    def __init__(self) -> None:
        self._pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]
        self._passes = 0

    def computed(self) -> None:
        """The last gradient of a backward pass is launched."""
        self._pairs[self._passes % 2][0].record()

    def seconds_before(self) -> float:
        """The sum over all ranks of this pass is launched. Seconds between the two in the pass before."""
        self._pairs[self._passes % 2][1].record()
        self._passes += 1
        if self._passes == 1:
            return 0.0
        computed, summed = self._pairs[self._passes % 2]
        return computed.elapsed_time(summed) / 1000


@dataclass
class _HookState:
    """What `_exchange` knows, and what it leaves: see `GradientExchange.ready_at`."""

    worker: Worker
    bf16: bool
    clock: GpuClock | None
    ready_at: float = 0.0


def _exchange(state, bucket):  # DDP reads the signature and takes no annotation that is a string
    if bucket.is_last():
        state.ready_at = time.perf_counter()
        if state.clock:
            state.clock.computed()
        state.worker.status.enter("all-reduce")
    buffer = bucket.buffer()
    send = (buffer.to(torch.bfloat16) if state.bf16 else buffer).div_(state.worker.world_size)
    future = dist.all_reduce(send, async_op=True).get_future()
    if not state.bf16:
        return future.then(lambda done: done.value()[0])
    return future.then(lambda done: buffer.copy_(done.value()[0]))


def _without_buffer_sync() -> Any:
    """The setting as a keyword argument, under its current name or the one that it had before torch 2.13."""
    known = inspect.signature(DistributedDataParallel).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
