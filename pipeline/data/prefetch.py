"""Making things ahead in a background thread."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Prefetch(Generic[T]):
    """Iterate over the items of blocks that a background thread makes, at most ``depth`` blocks ahead.

    With a depth of 0 there is no thread: blocks are made as they are asked for.

    Use it in a ``with`` block. An exception of ``blocks`` is raised where the consumer iterates. Leaving the ``with``
    block stops the thread, also when not everything was taken.
    """

    def __init__(self, blocks: Iterator[Sequence[T]], depth: int = 2):
        self._blocks, self._depth = blocks, depth
        self._ready: queue.Queue[tuple[str, Any]] = queue.Queue(maxsize=depth)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._produce, name="sparknorm-prefetch", daemon=True)

    def __enter__(self) -> Iterator[T]:
        if not self._depth:
            return (item for block in self._blocks for item in block)
        self._thread.start()
        return self._consume()

    def __exit__(self, *_: object) -> None:
        if not self._depth:
            self._close()
            return
        self._stop.set()
        self._thread.join(timeout=10)

    def _close(self) -> None:
        if hasattr(self._blocks, "close"):
            self._blocks.close()  # a generator's threads end with it

    def _consume(self) -> Iterator[T]:
        while True:
            kind, value = self._ready.get()
            if kind == "error":
                raise value
            if kind == "end":
                return
            yield from value

    def _produce(self) -> None:
        try:
            for block in self._blocks:
                if not self._put("block", block):
                    break
            else:
                self._put("end", None)
        except BaseException as error:  # noqa: BLE001 - raised in the consumer's thread
            self._put("error", error)
        finally:
            self._close()

    def _put(self, kind: str, value: Any) -> bool:
        """False once the consumer has left."""
        while not self._stop.is_set():
            try:
                self._ready.put((kind, value), timeout=0.1)
                return True
            except queue.Full:
                continue
        return False
