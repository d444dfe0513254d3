"""How much of its freed memory a process keeps, seen from within."""

import resource
from pathlib import Path

import torch

from pipeline.distributed.host_memory import give_back_freed_memory


def bytes_held() -> int:
    """Memory of this process that is resident now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def bytes_kept() -> int:
    """What it still holds of 300 MB in tensors of 30 MB once they are freed: all, or as usual no more than 64 MB.

    As usual each is a mapping of its own, or where blocks as large were freed before, glibc keeps up to twice the
    largest of them. How many page faults that saves hangs on what else the heap holds: from none to all.
    """
    give_back_freed_memory()
    start = bytes_held()
    many = [torch.ones(7_500_000) for _ in range(10)]
    del many
    return bytes_held() - start
