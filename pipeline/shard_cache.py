"""Copies of remote shards on a local disk, up to a size limit. Several processes of a host may share the folder.

A copy is named after the content's SHA-256, which is checked before it gets that name.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from pipeline import storage
from pipeline.manifest import DatasetError, Shard

_BLOCK_BYTES = 4 << 20
_SUFFIX = ".shard.parquet"


def local_copy(path: str, shard: Shard, folder: str, limit_bytes: int) -> str:
    """The path of a shard's copy on the local disk, fetched if it is not there; the longest unused ones make room.

    Raises
    ------
    DatasetError
        The shard is larger than the limit, or what was fetched is not what the manifest says.
    OSError
        It cannot be read, or the disk cannot be written.
    """
    if shard.bytes > limit_bytes:
        raise DatasetError(f"a shard of {shard.bytes} bytes does not fit reader.cache_bytes {limit_bytes}")
    copy = Path(folder) / f"{shard.sha256}{_SUFFIX}"
    if copy.is_file() and copy.stat().st_size == shard.bytes:
        os.utime(copy)
        return str(copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.unlink(missing_ok=True)
    _make_room(copy.parent, limit_bytes - shard.bytes)
    temporary = copy.with_name(f".{copy.name}.{uuid.uuid4().hex[:8]}")
    try:
        size, found = _fetch(path, temporary)
        if (size, found) != (shard.bytes, shard.sha256):
            raise DatasetError(
                f"was cut or altered: {size} bytes of SHA-256 {found}, "
                f"the manifest says {shard.bytes} of {shard.sha256}"
            )
        temporary.replace(copy)
    finally:
        temporary.unlink(missing_ok=True)
    return str(copy)


def _fetch(path: str, target: Path) -> tuple[int, str]:
    """Copy a file; its size and SHA-256."""
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as source, target.open("wb") as file:
        while block := source.read(_BLOCK_BYTES):
            file.write(block)
    with target.open("rb") as file:
        return target.stat().st_size, sha256_of(file)


def sha256_of(file: BinaryIO) -> str:
    """SHA-256 of an open file, as hexadecimal digits."""
    digest = hashlib.sha256()
    while block := file.read(_BLOCK_BYTES):
        digest.update(block)
    return digest.hexdigest()


def _make_room(folder: Path, limit_bytes: int) -> None:
    """Delete the longest unused copies until the rest fits. A process that has one open goes on reading it."""
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
