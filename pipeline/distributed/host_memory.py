"""The C library of a Python worker keeps freed memory, instead of giving it back to the system layer by layer.

torch frees the activations of a layer when the next ones are there. glibc gives large blocks back to the system at once
and gets them anew for the layer after: each page of them is then a fault of 2 to 3 us and is filled with zeros: of a
small residual network's time on a CPU about a quarter in inference, and a tenth in training.
"""

from __future__ import annotations

import ctypes
import functools
import os

# The numbers of mallopt(3). Blocks up to the second are taken from the heap, of which up to the first is kept free.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_KEPT_BYTES = 1 << 30
# Earlier versions of glibc take no more than this for the second (DEFAULT_MMAP_THRESHOLD_MAX).
_LARGEST_BLOCK_OF_OLD = 32 << 20
# With these a user has decided.
_ENVIRONMENT = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")


@functools.cache
def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees, up to 1 GiB, for what it allocates next.

    Its peak is about what it was, and between peaks it holds more, until `give_back_freed_memory` or its end. Only for
    processes that are the caller's own, since it holds for all that runs in them.

    Returns
    -------
    Whether it does: not with another C library than glibc, nor where the environment sets glibc's thresholds.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None or any(name in os.environ for name in _ENVIRONMENT):
        return False
    is_large = set_option(_MMAP_THRESHOLD, _KEPT_BYTES) or set_option(_MMAP_THRESHOLD, _LARGEST_BLOCK_OF_OLD)
    return bool(is_large and set_option(_TRIM_THRESHOLD, _KEPT_BYTES))


def give_back_freed_memory() -> None:
    """Give what this process holds and does not use back to the system, once; no more than glibc can."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
