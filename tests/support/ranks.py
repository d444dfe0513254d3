"""Run a function on several ranks of a real gloo group, without Spark; they may share a GPU."""

from __future__ import annotations

import multiprocessing
import time
import traceback
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from pipeline.distributed.worker import Worker, alone, process_group
from pipeline.training.loop import fit

TIMEOUT = timedelta(seconds=60)


def run_ranks(fn: Any, world_size: int, *args: Any, device: str = "cpu") -> list[Any]:
    """``[fn(worker, *args) for each rank]``; a world of one runs here, without a process group."""
    if world_size == 1:
        return [fn(alone(device), *args)]
    store = dist.TCPStore("127.0.0.1", 0, world_size + 1, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["pipeline.training.loop"]
    )  # torch is imported once, not by every rank of every test
    with context.Pool(world_size) as pool:
        calls = [(fn, rank, world_size, store.port, args, device) for rank in range(world_size)]
        return pool.starmap_async(_one_rank, calls, chunksize=1).get(timeout=240)


def _one_rank(fn: Any, rank: int, world_size: int, port: int, args: tuple, device_type: str, prefix: str = "") -> Any:
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, world_size + 1, is_master=False, timeout=TIMEOUT)
    store = dist.PrefixStore(prefix, store)
    device = torch.device("cpu") if device_type == "cpu" else torch.device("cuda", 0)
    with process_group(store, rank, world_size, device, TIMEOUT, backend="gloo"):
        return fn(Worker(rank, world_size, rank, world_size, device, "localhost"), *args)


class Outcome(NamedTuple):
    """How a function ended on one rank.

    error : class, message, notes and traceback of what it raised; empty where it returned
    seconds : from its start until the rank had left the process group
    after : what another function returned afterwards, on the same ranks in the same processes
    """

    error: str
    seconds: float
    after: Any


def outcomes_of_ranks(fn: Any, args: tuple, then: Any, then_args: tuple, *, device: str) -> list[Outcome]:
    """Run ``fn(worker, *args)`` on two ranks, of which some may fail, and then ``then(worker, *then_args)``."""
    store = dist.TCPStore("127.0.0.1", 0, 3, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pipeline.training.loop"])
    with context.Pool(2) as pool:
        calls = [(rank, store.port, fn, args, then, then_args, device) for rank in range(2)]
        return pool.starmap_async(_outcome, calls, chunksize=1).get(timeout=240)


def _outcome(rank: int, port: int, fn: Any, args: tuple, then: Any, then_args: tuple, device: str) -> Outcome:
    started, error = time.monotonic(), ""
    try:
        _one_rank(fn, rank, 2, port, args, device)
    except Exception as raised:  # noqa: BLE001 - what a test looks at
        error = "".join(traceback.format_exception(raised))
    seconds = time.monotonic() - started
    return Outcome(error, seconds, _one_rank(then, rank, 2, port, then_args, device, prefix="then"))


class Killed(BaseException):
    """What ends the training of `fit_until`: nothing in it may take this for an error."""


def fit_until(worker, job, last_step, with_dropout=False):
    """Train, dying on all ranks after a step; None trains to the end."""
    hook = partial(disturb, last_step=last_step, with_dropout=with_dropout)
    try:
        return fit(worker, replace(job, hook=hook))
    except Killed:
        return None


def disturb(moment, last_step, with_dropout):
    if moment.name == "network_built" and with_dropout:
        moment.model.append(torch.nn.Dropout(0.3))  # its result then depends on torch's random state
    elif moment.name == "checkpoint_begun" and last_step is not None:
        moment.wait_until_written()
    elif moment.name == "before_data" and moment.step == last_step:
        raise Killed
