"""Run a function on several ranks of a real gloo group, without Spark."""

from __future__ import annotations

import multiprocessing
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from pipeline.distributed.worker import Worker, alone, process_group

TIMEOUT = timedelta(seconds=60)


def run_ranks(fn: Any, world_size: int, *args: Any) -> list[Any]:
    """``[fn(worker, *args) for each rank]``; a world of one runs here, without a process group."""
    if world_size == 1:
        return [fn(alone("cpu"), *args)]
    store = dist.TCPStore("127.0.0.1", 0, world_size + 1, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pipeline.training.loop"]
    )  # torch is imported once, not by every rank of every test
    with context.Pool(world_size) as pool:
        calls = [(fn, rank, world_size, store.port, args) for rank in range(world_size)]
        return pool.starmap_async(_one_rank, calls, chunksize=1).get(timeout=240)


def _one_rank(fn: Any, rank: int, world_size: int, port: int, args: tuple) -> Any:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size + 1, is_master=False, timeout=TIMEOUT)
    device = torch.device("cpu")
    with process_group(store, rank, world_size, device, TIMEOUT):
        return fn(Worker(rank, world_size, rank, world_size, device, "localhost"), *args)
