"""torch asks a nameserver for the name of each address that it connects to, only to have it for its log.

Where that server is slow, loaded or behind a firewall, each rank waits five seconds and more before it joins, and
nobody is told why: of a launch of 64 ranks on one machine it was more than half.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

# Local to this machine, as all of 127.0.0.0/8 is, and in no hosts file, which would know a name for it.
_NAMELESS = "127.83.110.1"


class _ResolverState(ctypes.Structure):
    """The beginning of glibc's ``struct __res_state`` (resolv.h), of which each thread has one."""

    _fields_ = (("seconds", ctypes.c_int), ("tries", ctypes.c_int))


@functools.cache
def stop_name_lookups() -> None:
    """From now on torch logs addresses, in this process.

    torch gives names up for good once a lookup has failed for the moment (`formatSockAddr` in c10d's socket.cpp): here
    one fails at once, since the resolver may not try. Where glibc does not look names up itself (another C library,
    systemd's module), all stays as torch does it.
    """
    with suppress(AttributeError, OSError, RuntimeError), _no_lookups(), _silent():
        # A store of its own, which connects to itself, and ends at once.
        dist.TCPStore(_NAMELESS, 0, 1, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=5))


@contextmanager
def _no_lookups() -> Iterator[None]:
    """Lookups by this thread that need a nameserver fail at once in this block."""
    libc = ctypes.CDLL(None)
    libc.__res_state.restype = ctypes.POINTER(_ResolverState)
    libc.__res_init()  # otherwise the first lookup does so, and sets the number of tries
    state = libc.__res_state().contents
    tries, state.tries = state.tries, 0
    try:
        yield
    finally:
        state.tries = tries


@contextmanager
def _silent() -> Iterator[None]:
    """What torch warns of in this block, that a name cannot be retrieved, is what is wanted."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
