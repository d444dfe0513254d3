"""Whole files, published atomically, on anything fsspec opens.

Nothing here appends or seeks while writing, so object stores and Databricks Volumes work as a local disk does.
A file that is there is whole: on an object store it appears by one put, elsewhere by a rename.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel

# Object stores, where a file appears with all its bytes or not at all. Elsewhere (HDFS, SFTP) it is written under
# another name and renamed.
_PUT_IS_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "r2", "memory", "dbfs"}

# A disk with less than this has no room for checkpoints.
LEAST_FREE_BYTES = 200 << 20

# How long calls that fail are tried again where nothing goes on without their answer. A rank that waits so long is not
# yet taken for one that hangs (workers.stall_seconds, 180 by default).
RETRY_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.1, 5.0

T = TypeVar("T")


class StorageError(OSError):
    """Storage has failed for as long as a call was tried again. The message names the file and the last failure."""


class Retries:
    """Calls of storage that are tried again while they fail, with growing pauses.

    Parameters
    ----------
    seconds : in which all calls together are tried again; None is `RETRY_SECONDS`
    """

    def __init__(self, seconds: float | None = None):
        self._seconds = RETRY_SECONDS if seconds is None else seconds
        self._end = time.monotonic() + self._seconds

    def __call__(self, call: Callable[[str], T], path: str) -> T:
        """Return what ``call(path)`` returns.

        Raises
        ------
        FileNotFoundError
            There is no such file, which is an answer and no failure.
        StorageError
            The call has failed until the time was over.
        """
        pause = _FIRST_PAUSE_SECONDS
        while True:  # a plain loop: executors have no tenacity
            try:
                return call(path)
            except FileNotFoundError:
                raise
            except Exception as error:  # drivers of remote storage raise kinds of their own
                if time.monotonic() + pause > self._end:
                    reason = f"{type(error).__name__}: {error}"
                    raise StorageError(f"{path} cannot be used: {reason} (tried for {self._seconds:g} s)") from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of ``path`` and the path in its own terms (absolute for a local one)."""
    fs, inner = fsspec.core.url_to_fs(str(path))
    return fs, inner


def join(root: str, *parts: str) -> str:
    """``root/part/part`` for local paths and URLs alike."""
    return "/".join([str(root).rstrip("/"), *parts])


def absolute(path: str) -> str:
    """A path that means the same in every process: local paths are made absolute, URLs stay as they are."""
    fs, inner = filesystem(path)
    return inner if isinstance(fs, LocalFileSystem) else str(path)


def is_local(path: str) -> bool:
    return isinstance(filesystem(path)[0], LocalFileSystem)


def read_bytes(path: str) -> bytes:
    fs, inner = filesystem(path)
    with fs.open(inner, "rb") as file:
        return file.read()


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    fs.invalidate_cache(inner)
    return fs.exists(inner)


def names(folder: str) -> list[str]:
    """Sorted names of the files in a folder; none if the folder is not there. Unfinished files are left out."""
    fs, inner = filesystem(folder)
    fs.invalidate_cache(inner)
    try:
        found = fs.ls(inner, detail=False)
    except FileNotFoundError:
        return []
    return sorted(name for name in (path.rstrip("/").rsplit("/", 1)[-1] for path in found) if name[:1] != ".")


def publish(path: str, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file so that a reader sees all of it or nothing, also when this process dies here.

    ``durable=False`` is for what is written often and may be lost when the machine itself dies: it does not wait for
    the disk.
    """
    fs, inner = filesystem(path)
    if not isinstance(fs, LocalFileSystem):
        if _PUT_IS_ATOMIC.isdisjoint(fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)):
            temporary_name = join(inner.rpartition("/")[0], f".{inner.rpartition('/')[2]}.{uuid.uuid4().hex[:8]}")
            fs.pipe_file(temporary_name, data)
            fs.mv(temporary_name, inner)
        else:
            fs.pipe_file(inner, data)
        return
    target = Path(inner)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def publish_json(path: str, value: BaseModel | Any, *, allow_nan: bool = True) -> str:
    """Publish a result as JSON and return its path.

    Parameters
    ----------
    value
        A pydantic model, of which fields that were never set are left out, or plain JSON values.
    allow_nan
        Whether NaN and infinity are written, which strict readers of JSON refuse.

    Raises
    ------
    ValueError
        A number is NaN or infinite and ``allow_nan`` is false; nothing is written.
    """
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_unset=True)
    publish(path, json.dumps(value, indent=1, allow_nan=allow_nan).encode())
    return path


def remove(path: str) -> None:
    """Delete a file or a folder; it may already be gone."""
    fs, inner = filesystem(path)
    try:
        fs.rm(inner, recursive=True)
    except FileNotFoundError:
        return


def check_seen(path: str, text: str, *, writer: str) -> None:
    """Raise ValueError where this process does not read the text that ``writer``, another process, has published."""
    if not exists(path) or read_bytes(path).decode() != text:
        raise ValueError(f"{path}, written by {writer}, is not seen here: set `output` to a place that all share")


def check_replaces(path: str, text: str) -> None:
    """Write a file and replace it by ``text``, as every checkpoint does.

    Raises
    ------
    OSError
        It cannot be written.
    ValueError
        It was replaced, and reads as it was before.
    """
    for part in ("first", text):
        publish(path, part.encode())
        if read_bytes(path).decode() != part:
            raise ValueError(
                f"{path} was replaced, and reads as it was before: `output` is on storage that is not consistent"
            )


def free_bytes(folder: str) -> int | None:
    """Of the disk that has a folder. None where it cannot be known: an object store, or a folder that is not there."""
    local = is_local(folder) and exists(folder)
    return shutil.disk_usage(absolute(folder)).free if local else None
