"""Leave a process group within a bound, whatever the other ranks do.

torch's own way waits: gloo for collectives that others have not begun, NCCL for kernels that wait for others. After an
error the others may never come, and the error must get out.
"""

from __future__ import annotations

import gc
import logging
import threading
import traceback
from collections.abc import Iterator

import torch
import torch.distributed as dist

log = logging.getLogger(__name__)

# How long leaving may take: after an error, and at a good end, where others may still be about to finish.
AFTER_ERROR_SECONDS = 5.0
AT_END_SECONDS = 60.0


class _Process:
    """What this process has left behind. ``reusable``: whether it may serve another task."""

    reusable = True


def leave_process_group(device: torch.device, error: BaseException | None) -> None:
    """Leave the default process group, and give the memory that torch keeps on a GPU for later back.

    Nothing is waited for longer than `AFTER_ERROR_SECONDS` or `AT_END_SECONDS`. What is not done then goes on in a
    thread that nobody waits for, and `is_reusable` says no from then on.

    Parameters
    ----------
    error : why the group is left; None at a good end. After an error, NCCL's operations are aborted, and the variables
        of the frames that the error has left are freed: they hold the connections that the other ranks wait at, and
        memory of the device. Its text and its traceback stay.
    """
    failure: list[BaseException] = []

    def leave() -> None:
        try:
            if error is None:
                dist.destroy_process_group()
            else:
                _free_frames(error)
                _abort()
        except BaseException as raised:  # noqa: BLE001 - raised in the calling thread
            failure.append(raised)
        if device.type == "cuda":
            gc.collect()
            try:
                torch.cuda.empty_cache()
            except RuntimeError as raised:  # after an error of CUDA every call fails
                _Process.reusable = False
                log.debug("memory of %s could not be given back: %s", device, raised)

    thread = threading.Thread(target=leave, name="sparknorm-leave", daemon=True)
    thread.start()
    bound = AT_END_SECONDS if error is None else AFTER_ERROR_SECONDS
    thread.join(bound)
    if thread.is_alive():
        _Process.reusable = False
        log.warning("the process group was not left within %g s, since other ranks hold it: going on without", bound)
    elif failure:
        _Process.reusable = False
        if error is None:
            raise failure[0]
        log.warning("the process group could not be left: %s", failure[0])


def is_reusable() -> bool:
    """Whether this process may train again: it has left all its groups, and has not used CUDA.

    A process that has used CUDA keeps a context in the memory of the GPU while it lives, and after an error of CUDA
    each of its calls fails.
    """
    return _Process.reusable and not torch.cuda.is_initialized()


def _abort() -> None:
    """Leave the group without its other ranks, as far as torch can: gloo still waits for what others have begun."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)  # which torch before 2.6 does not have
    if abort is not None and dist.get_backend() == "nccl":
        abort()
    else:
        dist.destroy_process_group()


def _free_frames(error: BaseException) -> None:
    for raised in _chain(error):
        traceback.clear_frames(raised.__traceback__)
    gc.collect()  # DistributedDataParallel, which holds the group too, refers to itself


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if one is not None and id(one) not in seen:
            seen.add(id(one))
            yield one
            waiting += [one.__cause__, one.__context__]
