"""Whether a place that a setting names can be written: asked before anything is launched, and said where it cannot."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline import storage
from pipeline.storage import local_file

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_RIGHT = (errno.EROFS, errno.EACCES, errno.EPERM)
# Filesystems of fsspec that are made for reading.
_READ_ONLY = ("data", "gist", "git", "github", "http", "https", "libarchive", "reference", "tar", "zip")


class NotWritableError(ValueError):
    """A folder that a setting names cannot be written; the message says why, and what would be right."""


def prepare_output(output: str, *stale: str) -> None:
    """Check the folder of the setting ``output``, and remove files there that an earlier call has left: if this call
    fails, they must not look like its own.

    Raises
    ------
    NotWritableError
        ``output`` cannot be written.
    """
    check_writable("output", output)
    for file in stale:
        storage.remove(storage.join(output, file))


def check_writable(setting: str, folder: str) -> None:
    """Check that this process can make files in a local folder, or in the nearest one above it that is there. Nothing
    is left behind. A folder elsewhere is not asked: that would be requests, and their errors name it. But what a web
    server or an archive has, fsspec can only read.

    Parameters
    ----------
    setting : that names the folder, for the message

    Raises
    ------
    NotWritableError
        It cannot.
    """
    if not storage.is_local(folder):
        if (scheme := folder.partition(":")[0]) in _READ_ONLY:
            raise NotWritableError(
                f"{setting} {folder} cannot be written: {scheme} is for reading only; choose another {setting}"
            )
        return
    path = Path(storage.absolute(folder))
    try:
        there = next(each for each in (path, *path.parents) if each.exists())
        with local_file.under_passing_name(there / "sparknorm-writable", b"x", durable=False):
            pass
    except OSError as error:
        raise NotWritableError(
            f"{setting} {path} cannot be written from {socket.gethostname()}: {_reason(error, path)}, or choose "
            f"another {setting}"
        ) from error


@contextmanager
def naming_setting(setting: str, folder: str) -> Iterator[None]:
    """Turn an error of the block about a file below a folder, for which there is no room or no right, into a
    `NotWritableError` with the same words that says which setting names the folder."""
    try:
        yield
    except OSError as error:
        if (remedy := remedy_of(error, folder)) is None:
            raise
        raise NotWritableError(f"{error}: {remedy}, or choose another {setting}") from error


def remedy_of(error: OSError, folder: str) -> str | None:
    """What would mend an error on an executor about a file below a folder, for which there is no room or no right, or
    that such an error caused; None for any other."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    if not str(cause.filename).startswith(folder):
        return None
    if cause.errno in _NO_ROOM:
        return "make room there"
    return "let the user of the workers write there" if cause.errno in _NO_RIGHT else None


def _reason(error: OSError, path: Path) -> str:
    """What the system says, and what would mend it."""
    says = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in _NO_ROOM:
        return f"{says}: make room there"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        there = next(each for each in (path, *path.parents) if each.exists())
        return f"{os.strerror(errno.ENOTDIR)}, since {there} is a file: move it away"
    return f"{says}: let this user write there"
