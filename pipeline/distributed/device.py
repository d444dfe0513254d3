"""The device of a rank: the one that Spark assigned to its task, as CUDA_VISIBLE_DEVICES shows it. No Spark here.

An address is what the cluster's discovery script printed: an index of nvidia-smi ("3"), a UUID ("GPU-...") or the name
of a MIG device ("MIG-..."). CUDA counts only the devices that CUDA_VISIBLE_DEVICES lists, in its order, and reads that
variable once in a process: before that a MIG device can be chosen by setting it, afterwards only by looking up.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Sequence
from itertools import takewhile

import torch

VISIBLE = "CUDA_VISIBLE_DEVICES"


def choose_device(requested: str, address: str | None, local_rank: int) -> torch.device:
    """Choose the device of one rank and make it the current one of its process.

    Parameters
    ----------
    requested : "auto", "cpu" or "cuda"; auto takes the CPU where no GPU was assigned and torch sees none
    address : what Spark assigned to the task; None if it assigned nothing, and then ``local_rank`` is the index

    Raises
    ------
    ValueError
        A GPU was assigned or requested that this process cannot use; the message names setting, host and remedy.
    """
    if requested == "cpu":
        return torch.device("cpu")
    if address is not None and address.startswith("MIG-"):
        _show_mig_device(address)  # before the first question to CUDA, which would fix what it shows
    if not torch.cuda.is_available():
        if requested == "auto" and address is None:
            return torch.device("cpu")
        raise ValueError(f"workers.device is {requested}, but {_no_cuda()}")
    index = local_rank if address is None else _index_of(address)
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"GPU {index} was asked for, but {socket.gethostname()} has {torch.cuda.device_count()}"
            f"{_setting(_visible())}: start no more ranks on a host than it has GPUs, or set workers.device=cpu"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def try_device(device: torch.device, rank: int) -> None:
    """Compute on a small tensor of a rank's device, before any rank depends on it.

    Raises
    ------
    RuntimeError
        That is not possible; the message names device, rank, host, and the memory that is free.
    """
    try:
        torch.ones(1024, device=device).sum().item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        reason = str(error).partition("\n")[0]
        raise RuntimeError(
            f"rank {rank} cannot use {device} of {socket.gethostname()} ({describe_memory(device)}): {reason}; look "
            "with nvidia-smi for other processes on it, for compute mode Exclusive_Process, and errors of the driver"
        ) from error


def describe_memory(device: torch.device) -> str:
    """The free memory of a device in words."""
    if device.type == "cpu":
        free, total = (os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"))
        return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB of the host free"
    try:
        free, total = torch.cuda.mem_get_info(device)
        held = torch.cuda.memory_reserved(device)
    except (RuntimeError, AssertionError) as error:
        return f"its memory cannot be asked for: {type(error).__name__}"
    return f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free, this process holds {held / 2**30:.1f} GiB"


def device_index(address: str, visible: Sequence[str] | None, uuids: Sequence[str] | None) -> int | None:
    """The index of the device that an address means, among those that CUDA shows to this process. A pure function.

    Parameters
    ----------
    address : an index of nvidia-smi, a UUID, or the name of a MIG device
    visible : the entries of CUDA_VISIBLE_DEVICES (indexes, UUIDs or the beginnings of UUIDs); None if it is not set
    uuids : of the devices that CUDA shows, in its order; None while CUDA is not initialised (asked for MIG alone)

    Returns
    -------
    int or None
        From 0. None if CUDA_VISIBLE_DEVICES must first become the address alone, and then the index is 0.

    Raises
    ------
    ValueError
        The address is not among the visible devices.
    """
    if address.isdigit():
        if visible is None:
            return int(address)
        positions = [at for at, entry in enumerate(visible) if entry.isdigit() and int(entry) == int(address)]
    else:
        positions = [at for at, uuid in enumerate(uuids or ()) if _same(uuid, address)]
    if len(positions) == 1:
        return positions[0]
    if address.startswith("MIG-"):
        return _mig_index(address, visible, initialised=uuids is not None)
    raise _not_visible(address, visible, uuids)


def _mig_index(address: str, visible: Sequence[str] | None, initialised: bool) -> int | None:
    """`device_index` of a MIG device that CUDA does not show by its own UUID (it may show that of the GPU)."""
    listed = [entry for entry in visible or () if _same(entry, address)]
    if not initialised:
        if visible is None or listed:
            return None
        raise _not_visible(address, visible, None)
    if visible is not None and len(visible) == len(listed) == 1:
        return 0
    raise ValueError(
        f"Spark assigned {address} on {socket.gethostname()}, but this Python worker has initialised CUDA with other "
        f"devices{_setting(visible)}, and cannot change to this one: set spark.python.worker.reuse=false, or give "
        "each executor one MIG device"
    )


def _same(entry: str, address: str) -> bool:
    """Whether two UUIDs are the same: torch leaves "GPU-" out, and CUDA_VISIBLE_DEVICES may have a beginning only."""
    one, other = (text.lower().removeprefix("gpu-").removeprefix("mig-") for text in (entry, address))
    return bool(one) and bool(other) and (one.startswith(other) or other.startswith(one))


def _not_visible(address: str, visible: Sequence[str] | None, uuids: Sequence[str] | None) -> ValueError:
    shown = f"; CUDA shows {', '.join(uuids)}" if uuids and not address.isdigit() else ""
    return ValueError(
        f"Spark assigned GPU {address} on {socket.gethostname()}, which is not among its visible devices"
        f"{_setting(visible)}{shown}: let the discovery script (spark.worker.resource.gpu.discoveryScript) print what "
        f"{VISIBLE} lists, in the same form, or unset {VISIBLE} for the executors"
    )


def _setting(visible: Sequence[str] | None) -> str:
    return "" if visible is None else f" ({VISIBLE}={','.join(visible)})"


def _visible() -> list[str] | None:
    """The entries of CUDA_VISIBLE_DEVICES, up to the first that CUDA does not understand; it ignores the rest."""
    if VISIBLE not in os.environ:
        return None
    entries = (entry.strip() for entry in os.environ[VISIBLE].split(","))
    return list(takewhile(re.compile(r"\d+$|GPU-|MIG-").match, entries))


def _index_of(address: str) -> int:
    # Reading the properties of a device makes no context on it, so this takes no memory of the others' GPUs.
    count = 0 if address.isdigit() else torch.cuda.device_count()
    index = device_index(address, _visible(), [str(torch.cuda.get_device_properties(at).uuid) for at in range(count)])
    assert index is not None, "CUDA is initialised here"
    return index


def _show_mig_device(address: str) -> None:
    """Make CUDA show this MIG device alone, if CUDA can still be told: it cannot choose one of several by itself."""
    if torch.cuda.is_initialized() or device_index(address, _visible(), None) is not None:
        return
    before = os.environ.get(VISIBLE)
    os.environ[VISIBLE] = address
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 1:
        return
    # A Python worker serves other tasks later: they must find the variable as the cluster set it.
    if before is None:
        del os.environ[VISIBLE]
    else:
        os.environ[VISIBLE] = before
    if count > 1:
        raise ValueError(
            f"Spark assigned {address} on {socket.gethostname()}, but something in this Python worker has asked CUDA "
            f"for its devices before, and CUDA goes on showing {count}: set spark.python.worker.reuse=false"
        )


def _no_cuda() -> str:
    build = "" if torch.version.cuda else " (this torch was built without CUDA)"
    return (
        f"torch sees no CUDA device on {socket.gethostname()}{_setting(_visible())}{build}: give its executors a GPU "
        "and a torch built for CUDA, or set workers.device=cpu"
    )
