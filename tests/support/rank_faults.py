"""What the code that ranks run may do wrong: training functions for `small_training.launch`.

They are a user's code: executors do not have this module, its functions travel to them by value.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from pyspark import cloudpickle

from pipeline.training import checkpoint, loop

cloudpickle.register_pickle_by_value(sys.modules[__name__])

Fit = Callable[..., dict[str, Any]]
HANG_SECONDS = 1000  # "for ever", should nobody end it


def model_raises(*, rank: int, step: int, once: bool = False) -> Fit:
    """The model's forward pass raises on one rank at a step; ``once``: in the first attempt alone."""
    return partial(_fit_with_hook, rank=rank, step=step, once=once)


def _fit_with_hook(worker, job, *, rank, step, once):
    def raise_there(module, inputs):
        position = worker.status.position
        here = worker.rank == rank and position.phase == "forward" and position.step == step
        if here and not (once and worker.attempt > 1):
            raise ZeroDivisionError("the model's own mistake")

    build = loop.build_model

    def build_model(*args, **settings):
        model = build(*args, **settings)
        model.register_forward_pre_hook(raise_there)
        return model

    with mock.patch.object(loop, "build_model", build_model):
        return loop.fit(worker, job)


def hang(how: str, *, rank: int, step: int) -> Fit:
    """One rank hangs while it waits for the data of a step.

    how : "sleep"; "native", in C with the interpreter lock held, so that no Python thread runs; "stopped" by SIGSTOP
    """
    return partial(_fit_that_hangs, how, rank=rank, step=step)


def _fit_that_hangs(how, worker, job, *, rank, step):
    one_step = loop._Trainer._step

    def step_that_hangs(self, batches):
        if worker.rank == rank and self.progress.step == step:
            batches = _batch_that_does_not_come(how)
        return one_step(self, batches)

    with mock.patch.object(loop._Trainer, "_step", step_that_hangs):
        return loop.fit(worker, job)


def _batch_that_does_not_come(how: str) -> Iterator[Any]:
    if how == "native":
        ctypes.PyDLL(None).sleep(HANG_SECONDS)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(HANG_SECONDS)
    yield None


def disk_full(*, steps: Collection[int], file_bytes: int) -> Fit:
    """Rank 0 can write no file above a size while it saves the checkpoints of these steps."""
    return partial(_fit_on_a_full_disk, steps=steps, file_bytes=file_bytes)


def _fit_on_a_full_disk(worker, job, *, steps, file_bytes):
    save = checkpoint.save

    def save_there(*args, step, **settings):
        with _limited(file_bytes) if step in steps else contextlib.nullcontext():
            return save(*args, step=step, **settings)

    with mock.patch.object(checkpoint, "save", save_there):
        return loop.fit(worker, job)


@contextlib.contextmanager
def _limited(file_bytes: int) -> Iterator[None]:
    """The kernel refuses to let this process write files above this size: EFBIG, where a full disk says ENOSPC."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def with_its_log(worker, job):
    """`loop.fit`; what rank 0 logs as warnings is added to the file ``log`` in the job's folder."""
    handler = logging.FileHandler(Path(job.folder, "log") if worker.rank == 0 else os.devnull)
    handler.setLevel(logging.WARNING)
    logging.getLogger("pipeline").addHandler(handler)
    try:
        return loop.fit(worker, job)
    finally:
        logging.getLogger("pipeline").removeHandler(handler)
        handler.close()
