"""Copies of remote shards on a local disk, up to a size limit. Several processes of a host may share the folder.

A copy is named after the content's SHA-256, which is checked before it gets that name.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pipeline import storage
from pipeline.data.manifest import DatasetError, Shard

_BLOCK_BYTES = 4 << 20
_SUFFIX = ".shard.parquet"
# A half-fetched file that nobody has written to for so long is of a process that was killed.
_ABANDONED_SECONDS = 24 * 3600


def open_copy(path: str, shard: Shard, folder: str, limit_bytes: int) -> BinaryIO:
    """Open a shard's copy on the local disk, fetched if it is not there; the longest unused copies make room.

    The open file can be read to its end whatever another process deletes.

    Parameters
    ----------
    path : of the shard itself
    folder : of the copies; it is made if it is not there
    limit_bytes : size limit of the folder

    Raises
    ------
    DatasetError
        The shard is larger than the limit, or what was fetched is not what the manifest says.
    OSError
        It cannot be read, or the disk cannot be written.
    """
    if shard.bytes > limit_bytes:
        raise DatasetError(
            f"a shard of {shard.bytes} bytes does not fit reader.cache_bytes {limit_bytes}: raise that to a multiple "
            f"of {shard.bytes}, or ingest with a lower dataset.shard_bytes"
        )
    copy = copy_path(shard, folder)
    with suppress(FileNotFoundError):
        file = copy.open("rb")
        if os.fstat(file.fileno()).st_size == shard.bytes:
            os.utime(file.fileno())
            return file
        file.close()
    copy.parent.mkdir(parents=True, exist_ok=True)
    _make_room(copy.parent, limit_bytes - shard.bytes)
    temporary = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}")
    try:
        _fetch(path, temporary)
        file = temporary.open("rb")
        size, sha256 = os.fstat(file.fileno()).st_size, sha256_of(file)
        if (size, sha256) != (shard.bytes, shard.sha256):
            file.close()
            raise DatasetError(
                f"was cut or altered: {size} bytes of SHA-256 {sha256}, "
                f"the manifest says {shard.bytes} of {shard.sha256}"
            )
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def copy_path(shard: Shard, folder: str) -> Path:
    """Where the copy of a shard lies in the folder of copies, fetched or not."""
    return Path(folder).expanduser() / f"{shard.sha256}{_SUFFIX}"


def _fetch(path: str, target: Path) -> None:
    with storage.open_file(path) as source, target.open("wb") as file:
        while block := source.read(_BLOCK_BYTES):
            file.write(block)


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of an open file from its start, as hexadecimal digits."""
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type] # which has `readinto`, untold


def _make_room(folder: Path, limit_bytes: int) -> None:
    """Delete the longest unused copies until the rest fits. A process that has one open goes on reading it."""
    for path in folder.glob(f".*{_SUFFIX}.*"):
        with suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > _ABANDONED_SECONDS:
                path.unlink()
    copies = []
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(FileNotFoundError):  # another process made room at the same time
            copies.append((path.stat().st_mtime, path.stat().st_size, path))
    total = sum(size for _, size, _ in copies)
    for _, size, path in sorted(copies):
        if total <= limit_bytes:
            return
        path.unlink(missing_ok=True)
        total -= size
