"""A file of remote storage, open for reading."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from typing import Any, BinaryIO, TypeVar, cast

from pipeline.storage.outage import retry

Answer = TypeVar("Answer")


def open_remote(fs: Any, inner: str, path: str) -> BinaryIO:
    """Open ``path``, which fsspec's filesystem ``fs`` calls ``inner``; it is opened when it is first read.

    Raises
    ------
    FileNotFoundError, UnreachableError
        From the first reading, and the second from each.
    """
    return cast(BinaryIO, io.BufferedReader(_RemoteFile(fs, inner, path)))


class _RemoteFile(io.RawIOBase):
    """Each read of it is tried again, from the same byte, where storage fails for a moment."""

    def __init__(self, fs: Any, inner: str, path: str):
        self._fs, self._inner, self._path = fs, inner, path
        self._file: Any = None
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset += self._retry(lambda file: file.seek(0, os.SEEK_END))
        self._at = offset + (self._at if whence == os.SEEK_CUR else 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._retry(lambda file: self._read(file, len(buffer)))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def _read(self, file: Any, count: int) -> bytes:
        file.seek(self._at)
        return file.read(count)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()

    def _retry(self, call: Callable[[Any], Answer]) -> Answer:
        return retry(lambda: self._once(call), "read", self._path)

    def _once(self, call: Callable[[Any], Answer]) -> Answer:
        """The result of one try. A file that failed is opened anew for the next: nobody knows what it holds."""
        if self._file is None:
            self._file = self._fs.open(self._inner, "rb")
        try:
            return call(self._file)
        except Exception:
            self._file = None
            raise
