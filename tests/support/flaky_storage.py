"""A filesystem that fails as remote storage does: some calls, with an exception of its own, or half of a file."""

from __future__ import annotations

import io
from typing import Any, ClassVar

import fsspec
from fsspec.implementations.local import LocalFileSystem


class ThrottledError(Exception):
    """What a driver of remote storage raises: no OSError."""


class FlakyFileSystem(LocalFileSystem):
    """Local files at ``flaky:///path``. Class variables say what fails.

    failures : calls that are still to fail, by the end of the path that they are for
    halves : reads that are still to give half of a file, by the end of its path
    """

    protocol = "flaky"
    failures: ClassVar[dict[str, float]] = {}
    halves: ClassVar[dict[str, float]] = {}

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def ls(self, path: str, detail: bool = False, **more: Any) -> Any:
        self._fail(path)
        return super().ls(path, detail=detail, **more)

    def open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        self._fail(path)
        file = super().open(path, mode, **more)
        if not _is_due(self.halves, path):
            return file
        with file:
            content = file.read()
        return io.BytesIO(content[: len(content) // 2])

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        self._fail(path)
        super().rm(path, recursive=recursive, maxdepth=maxdepth)

    def rm_file(self, path: Any) -> None:
        self._fail(path)
        super().rm_file(path)

    def _fail(self, path: str) -> None:
        if _is_due(self.failures, path):
            raise ThrottledError("503 SlowDown")


def _is_due(counts: dict[str, float], path: str) -> bool:
    for end, count in counts.items():
        if str(path).endswith(end) and count > 0:
            counts[end] = count - 1
            return True
    return False


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
