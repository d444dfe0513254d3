"""What may go wrong on a rank: hooks of a training (`pipeline.training.hooks`), for `Job.hook`.

They are a user's code: executors do not have this module, its functions travel to them by value.
"""

from __future__ import annotations

import ctypes
import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path

from pyspark import cloudpickle

from pipeline.training.hooks import Hook, Moment

cloudpickle.register_pickle_by_value(sys.modules[__name__])

HANG_SECONDS = 1000  # "for ever", should nobody end it


def model_raises(*, rank: int, step: int, once: bool = False) -> Hook:
    """The model's forward pass raises on one rank at a step; ``once``: in the first attempt alone."""
    return partial(_build_a_model_that_raises, rank=rank, step=step, once=once)


def _build_a_model_that_raises(moment: Moment, *, rank: int, step: int, once: bool) -> None:
    worker = moment.worker

    def raise_there(module, inputs):
        position = worker.status.position
        here = worker.rank == rank and position.phase == "forward" and position.step == step
        if here and not (once and worker.attempt > 1):
            raise ZeroDivisionError("the model's own mistake")

    if moment.name == "network_built":
        moment.model.register_forward_pre_hook(raise_there)


def storage_fails(text: str, *, rank: int, step: int) -> Hook:
    """One rank's storage fails at a step, with this text."""
    return partial(_fail_there, text, rank=rank, step=step)


def _fail_there(text: str, moment: Moment, *, rank: int, step: int) -> None:
    if (moment.name, moment.worker.rank, moment.step) == ("before_data", rank, step):
        raise OSError(text)


def hang(how: str, *, rank: int, step: int) -> Hook:
    """One rank hangs while it waits for the data of a step.

    how : "sleep"; "native", in C with the interpreter lock held, so that no Python thread runs; "stopped" by SIGSTOP
    """
    return partial(_hang_there, how, rank=rank, step=step)


def _hang_there(how: str, moment: Moment, *, rank: int, step: int) -> None:
    if (moment.name, moment.worker.rank, moment.step) == ("before_data", rank, step):
        _batch_that_does_not_come(how)


def _batch_that_does_not_come(how: str) -> None:
    if how == "native":
        ctypes.PyDLL(None).sleep(HANG_SECONDS)
    elif how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        time.sleep(HANG_SECONDS)


def disk_full(*, steps: Collection[int], file_bytes: int) -> Hook:
    """Rank 0 can write no file above a size while it saves the checkpoints of these steps.

    The kernel refuses to let the process write larger files: EFBIG, where a full disk says ENOSPC.
    """
    return partial(_limit_files, steps=steps, file_bytes=file_bytes)


def _limit_files(moment: Moment, *, steps: Collection[int], file_bytes: int) -> None:
    most = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    if moment.name == "before_write" and moment.step in steps:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, most))
    elif moment.name == "after_write":
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    elif moment.name == "checkpoint_begun" and moment.wait_until_written:
        moment.wait_until_written()  # a state that is due waits for the one before: none is passed over here


def log_of_restoring(moment: Moment) -> None:
    """What rank 0 logs as warnings until it has restored is added to the file ``log`` in the job's folder."""
    log = logging.getLogger("pipeline")
    if moment.worker.rank == 0 and moment.name == "network_built":
        handler = logging.FileHandler(Path(moment.job.folder, "log"))
        handler.setLevel(logging.WARNING)
        log.addHandler(handler)
    elif moment.worker.rank == 0 and moment.name == "restored":
        handler = next(each for each in log.handlers if isinstance(each, logging.FileHandler))
        log.removeHandler(handler)
        handler.close()


def slow_at(moment: str, step: int | None, *, seconds: float) -> Hook:
    """Ranks take their time at the first moment of this name from a step on, and say so in the job's folder, file
    ``slow``.

    step : None is the last one of an epoch: after it comes an evaluation
    """
    return partial(_take_time, name=moment, step=step, seconds=seconds)


def _take_time(moment: Moment, *, name: str, step: int | None, seconds: float) -> None:
    due = moment.step >= step if step is not None else moment.step % moment.steps_per_epoch == 0
    path = Path(moment.job.folder, f"slow-{moment.worker.rank}")
    if moment.name == name and due and not path.exists():
        path.touch()
        Path(moment.job.folder, "slow").touch()
        time.sleep(seconds)
