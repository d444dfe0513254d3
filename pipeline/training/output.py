"""A place that does not take what a training writes, as an error that says what to change."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

AGAIN = "and give the same command again: it goes on from the newest checkpoint"
_NO_ROOM = f"make room there or set `output` to another disk, {AGAIN}"
_NO_RIGHT = f"let the user of the workers write there or set `output` to another place, {AGAIN}"
_WAYS = {errno.ENOSPC: _NO_ROOM, errno.EDQUOT: _NO_ROOM, errno.EROFS: _NO_RIGHT, errno.EACCES: _NO_RIGHT,
         errno.EPERM: _NO_RIGHT}  # fmt: skip


class OutputError(OSError, ValueError):
    """A rank cannot write into the folder of its training, which is below the setting ``output``."""

    final = True  # another launch would find the same
    explained = True  # by its message, to which a traceback would add nothing


@contextmanager
def explain_output(folder: str) -> Iterator[None]:
    """Turn an error about a file of the job's folder that the block could not write, or that such an error caused, into
    an `OutputError` with the same words and what would be right."""
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        if cause.errno not in _WAYS or not str(cause.filename).startswith(folder):
            raise
        raise OutputError(f"{error}; {_WAYS[cause.errno]}") from error
