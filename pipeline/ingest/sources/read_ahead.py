"""The content of files, read by threads before it is asked for."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline import storage
from pipeline.storage.outage import retry

# What a task reads before it is asked for, by so many threads.
_AHEAD_THREADS, _AHEAD_BYTES = 8, 32 << 20
# Small files on a local disk that a thread reads one after the other: to hand one over costs as much as to read it.
_TOGETHER_FILES, _TOGETHER_BYTES = 4, 256 << 10
# A row of `Source.items`.
Item = dict[str, Any]


def read_ahead(items: list[Item], root: str) -> Iterator[tuple[Item, bytes | None, bool]]:
    """Each item with its file's content, in their order; None for an item with a problem, or a file that is missing or
    forbidden, of which the last value tells.

    Files are read by threads while those before them are decoded, so that the storage's latency is hidden; by at most
    `_AHEAD_THREADS`, and no more than one file beyond `_AHEAD_BYTES`.
    """
    reading: deque[tuple[list[Item], Future[list[bytes | OSError | None]]]] = deque()
    left, ahead_bytes, is_local = deque(items), 0, storage.is_local(root)
    with ThreadPoolExecutor(_AHEAD_THREADS, thread_name_prefix="sparknorm-files") as executor:
        try:
            while reading or left:
                while left and len(reading) < _AHEAD_THREADS and ahead_bytes < _AHEAD_BYTES:
                    some = _next_items(left, min(_TOGETHER_BYTES, _AHEAD_BYTES - ahead_bytes) if is_local else 0)
                    ahead_bytes += sum(item["size"] or 0 for item in some)
                    reading.append((some, executor.submit(_read_some, some, root, is_local=is_local)))
                some, coming = reading.popleft()
                for item, content in zip(some, coming.result(), strict=True):
                    if isinstance(content, storage.UnreachableError):
                        raise content
                    ahead_bytes -= item["size"] or 0
                    is_unreadable = isinstance(content, OSError)
                    yield item, None if isinstance(content, OSError) else content, is_unreadable
        finally:
            executor.shutdown(cancel_futures=True)


def _next_items(left: deque[Item], most_bytes: int) -> list[Item]:
    """Take the first item, and those after it as long as all have no more bytes than these."""
    some = [left.popleft()]
    size = some[0]["size"] or 0
    while left and len(some) < _TOGETHER_FILES and size + (left[0]["size"] or 0) <= most_bytes:
        some.append(left.popleft())
        size += some[-1]["size"] or 0
    return some


def _read_some(items: list[Item], root: str, *, is_local: bool) -> list[bytes | OSError | None]:
    """In a thread: the content of each file, or why it cannot be read; None for an item with a problem."""
    contents: list[bytes | OSError | None] = []
    for item in items:
        try:
            path = storage.join(root, item["path"])
            contents.append(_read_file(path, is_local=is_local) if item["problem"] is None else None)
        except OSError as error:
            contents.append(error)
        except storage.AddressError as error:  # a name with :: on remote storage
            contents.append(OSError(str(error)))
    return contents


def _read_file(path: str, *, is_local: bool) -> bytes:
    """To find the filesystem of a local file takes as long as to read it."""
    return retry(Path(path).read_bytes, "read", path) if is_local else storage.read_bytes(path)
