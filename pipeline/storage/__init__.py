"""Whole files, published atomically, on anything fsspec opens.

Nothing here appends or seeks while writing, so object stores and Databricks Volumes work as a local disk does.
A file that is there is whole: on an object store it appears by one put, elsewhere by a rename.

A call to storage that fails for a moment is made again (`outage`); one that goes on failing is an `UnreachableError`,
whatever its driver raises, so that nobody takes "cannot be read now" for "is not there".
"""

from __future__ import annotations

import contextvars
import json
import shutil
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel

from pipeline.config.secrets import masked
from pipeline.storage import local_file
from pipeline.storage.address import AddressError, absolute, check_creates, filesystem, is_local, join
from pipeline.storage.file_version import version_of
from pipeline.storage.literal import move, remove_all
from pipeline.storage.outage import (
    RETRY_SECONDS,
    UnreachableError,
    is_empty_file,
    is_outage,
    is_unexplained,
    retry,
    retry_for,
)
from pipeline.storage.remote_file import open_remote

__all__ = ["LEAST_FREE_BYTES", "RETRY_SECONDS", "AddressError", "UnreachableError", "absolute", "check_replaces",
           "check_seen", "create", "entries", "exists", "filesystem", "free_bytes", "is_folder", "is_local",
           "is_outage", "join", "names", "open_file", "publish", "publish_json", "read_bytes", "read_many",
           "read_range", "remove", "remove_file", "retry_for", "size", "version", "versions"]  # fmt: skip

# Object stores, where a file appears with all its bytes or not at all. Elsewhere (HDFS, SFTP) it is written under
# another name and renamed.
_PUT_IS_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "r2", "memory", "dbfs"}
# Its driver asks for the size of a file before it reads it, a request of its own: so many bytes are read without that.
_S3, _FIRST_BYTES = {"s3", "s3a"}, 4 << 20
# Files that are read at once.
_READERS = 8

# A disk with less than this has no room for checkpoints.
LEAST_FREE_BYTES = 200 << 20


def read_bytes(path: str) -> bytes:
    fs, inner = filesystem(path)
    return retry(lambda: _read_bytes(fs, inner), "read", path)


def read_many(paths: Sequence[str]) -> list[bytes | Exception]:
    """The bytes of each file, or what reading it raised; up to eight are read at once."""
    if len(paths) < 2:
        return [_bytes_or_error(path) for path in paths]
    with ThreadPoolExecutor(min(_READERS, len(paths)), thread_name_prefix="sparknorm-read") as pool:
        # Each thread tries again for as long as the caller does (`retry_for`).
        waiting = [pool.submit(contextvars.copy_context().run, _bytes_or_error, path) for path in paths]
        return [future.result() for future in waiting]


def _bytes_or_error(path: str) -> bytes | Exception:
    try:
        return read_bytes(path)
    except Exception as error:  # noqa: BLE001 - the caller's to judge
        return error


def _read_bytes(fs: Any, inner: str) -> bytes:
    if _is_one_of(fs, _S3):
        try:
            first = fs.cat_file(inner, start=0, end=_FIRST_BYTES)
        except OSError as error:
            if is_empty_file(error):
                return b""
            raise
        if len(first) < _FIRST_BYTES:
            return first
    try:
        return fs.cat_file(inner)
    except OSError as error:
        if not is_unexplained(error):
            raise
    return fs.cat_file(inner, start=0)  # one GET, which is refused with a reason


def read_range(path: str, start: int, end: int) -> bytes:
    """Bytes [start, end) of a file."""
    fs, inner = filesystem(path)
    return retry(lambda: fs.cat_file(inner, start=start, end=end), "read", path)


def open_file(path: str) -> BinaryIO:
    """Open a file for reading. Where storage fails for a moment, a remote one goes on from the same byte."""
    fs, inner = filesystem(path)
    return Path(inner).open("rb") if isinstance(fs, LocalFileSystem) else open_remote(fs, inner, path)


def exists(path: str) -> bool:
    """Whether a file or a folder is there now. Storage that does not say is an `UnreachableError`."""
    return _info(path) is not None


def is_folder(path: str) -> bool:
    return (_info(path) or {}).get("type") == "directory"


def size(path: str) -> int | None:
    """Bytes of a file as it is now; None if it is not there."""
    info = _info(path)
    return info and int(info["size"])


def version(path: str) -> str | None:
    """A text that is another one when a file has been replaced, as `versions` has it; None if it is not there."""
    info = _info(path)
    return info and version_of(info)


def _info(path: str) -> Any:
    fs, inner = filesystem(path)
    fs.invalidate_cache(inner)
    try:
        # Not `fs.exists` and `fs.isdir`: to most drivers, what they cannot look up is not there.
        return retry(lambda: fs.info(inner), "looked up", path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def names(folder: str) -> list[str]:
    """Sorted names of the files in a folder; none if the folder is not there. Unfinished files are left out."""
    fs, inner = filesystem(folder)
    fs.invalidate_cache(inner)
    try:
        found = retry(lambda: fs.ls(inner, detail=False), "listed", folder)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(name for name in (path.rstrip("/").rsplit("/", 1)[-1] for path in found) if name[:1] != ".")


def entries(folder: str, *, below: bool = False) -> list[Any]:
    """What fsspec tells of all that is in a folder now (``name``, ``size``, ``type``); nothing if it is not there.

    Parameters
    ----------
    below : whether all files below the folder are listed, instead of the files and folders in it
    """
    fs, inner = filesystem(folder)
    fs.invalidate_cache(inner)
    try:
        if below:
            return list(retry(lambda: fs.find(inner, detail=True), "listed", folder).values())
        return retry(lambda: fs.ls(inner, detail=True), "listed", folder)
    except (FileNotFoundError, NotADirectoryError):
        return []


def versions(folder: str) -> dict[str, str]:
    """For each file of a folder, by its name, a text that is another one when the file has been replaced.

    Where the driver tells nothing but the size, that is the text. Unfinished files are left out.
    """
    return {
        name: version_of(entry)
        for entry in entries(folder)
        if entry["type"] == "file" and (name := entry["name"].rpartition("/")[2])[:1] != "."
    }


def publish(path: str, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file so that a reader sees all of it or nothing, also when this process dies here.

    ``durable=False`` is for what is written often and may be lost when the machine itself dies: it does not wait for
    the disk.
    """
    retry(lambda: _publish(path, data, durable=durable), "written", path)


def _publish(path: str, data: bytes, *, durable: bool) -> None:
    fs, inner = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        with local_file.under_passing_name(Path(inner), data, durable=durable) as temporary:
            temporary.replace(inner)
    elif _is_one_of(fs, _PUT_IS_ATOMIC):
        fs.pipe_file(inner, data)
    else:
        temporary_name = join(inner.rpartition("/")[0], f".{inner.rpartition('/')[2]}.{uuid.uuid4().hex[:8]}")
        fs.pipe_file(temporary_name, data)
        move(fs, temporary_name, inner)


def _is_one_of(fs: Any, protocols: set[str]) -> bool:
    return not protocols.isdisjoint(fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def create(path: str, data: bytes) -> bool:
    """Make a whole file where there is none: of all that try at once, one does.

    A local file is linked into place (on a disk without hard links it is there empty for a moment, and stays so where
    this process dies in that moment); S3, Google Cloud Storage and Azure are asked for a put under the condition that
    nothing is there.
    Other filesystems (HDFS, SFTP) have no such request: there this looks first and reads again afterwards, so that
    two who try within milliseconds may both be told True. Who must know for certain reads the file again later.

    Parameters
    ----------
    data : unlike what anybody else would write (with a random number in it, say): a request whose answer got lost is
        sent again, and then the content says who made the file

    Returns
    -------
    created : True where this call made the file, False where it was there already, which then stays as it is
    """
    fs, inner = filesystem(path)
    if isinstance(fs, LocalFileSystem):
        return local_file.create(Path(inner), data)
    if exists(path):
        return False
    put_is_atomic = _is_one_of(fs, _PUT_IS_ATOMIC)
    if put_is_atomic:
        check_creates(fs, path)

    def put() -> None:
        try:
            if put_is_atomic:
                fs.pipe_file(inner, data, mode="create")
            else:
                _publish(path, data, durable=True)
        except Exception:  # drivers raise their own kinds where a file is there already
            if not exists(path):
                raise

    retry(put, "written", path)
    return read_bytes(path) == data


def publish_json(path: str, value: BaseModel | Any, *, allow_nan: bool = True) -> str:
    """Publish a result as JSON, its secrets masked, and return its path.

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
    publish(path, json.dumps(masked(value), indent=1, allow_nan=allow_nan).encode())
    return path


def remove(path: str) -> None:
    """Delete a file or a folder; it may already be gone. ``*``, ``?`` and ``[`` in its name are letters as others."""
    fs, inner = filesystem(path)
    with suppress(FileNotFoundError):
        retry(lambda: remove_all(fs, inner), "removed", path)


def remove_file(path: str) -> None:
    """Delete a file; it may already be gone. Unlike `remove` it does not look first: it is one request."""
    fs, inner = filesystem(path)
    with suppress(FileNotFoundError):
        retry(lambda: fs.rm_file(inner), "removed", path)


def check_seen(path: str, text: str, *, writer: str) -> None:
    """Raise ValueError where this process does not read the text that ``writer``, another process, has published."""
    with suppress(FileNotFoundError, NotADirectoryError):
        if read_bytes(path) == text.encode():
            return
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
    return shutil.disk_usage(absolute(folder)).free if is_local(folder) and exists(folder) else None
