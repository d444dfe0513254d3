"""A place that does not take what a training writes, as an error that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.storage.writable import remedy_of

AGAIN = "and give the same command again: it goes on from the newest checkpoint"


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
        if (remedy := remedy_of(error, folder)) is None:
            raise
        raise OutputError(f"{error}; {remedy} or set `output` to another disk, {AGAIN}") from error
