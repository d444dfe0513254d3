"""PNG and JPEG images of a batch -> pixels, several at once, in processes or in threads, ahead of training.

Processes write into memory that they share with the rank, so that pixels are copied nowhere. A batch is a view of it,
and its part is used again once the batch, and all that was cut of it, is gone. Where a consumer keeps more of them than
there are parts, images are decoded by threads into memory of their own.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from pipeline.data.codec import decode_images
from pipeline.data.decode_process import ANSWER, FAILED, LENGTH, REQUEST

# Bytes of pixels that a thread or process decodes at once: few enough that all end a batch at about the same time.
_PIECE_BYTES = 2 << 20
# Blocks of batches whose pixels are somewhere: two that are decoded, three that wait, two that the consumer has.
_BLOCKS = 7
# The first answer includes the start of Python and its imports, on a machine that may be busy with other ranks.
_ANSWER_SECONDS = 300.0
_END_SECONDS = 5.0
# Linux: the size of a pipe, 64 KiB unless it is set, which is two photographs.
_SET_PIPE_SIZE, _PIPE_BYTES = 1031, 1 << 20


class DecodeError(RuntimeError):
    """A process that decodes images failed or died; the message says how."""


class Decoders:
    """Decodes blocks of images in the background.

    Parameters
    ----------
    shape : (C, H, W) of every image
    count : threads, or processes where ``processes`` is set
    most_images : of one block
    """

    def __init__(self, shape: tuple[int, int, int], *, count: int, most_images: int, processes: bool):
        self._shape, self._image_bytes = shape, int(np.prod(shape))
        # A process that has answered begins with the next request at once, and not when a thread of this process, which
        # may have to wait for the interpreter lock, has sent it: so each has two threads that ask.
        self._executor = ThreadPoolExecutor(2 * count if processes else count, thread_name_prefix="sparknorm-decoder")
        self._piece = max(1, min(-(-most_images // count), _PIECE_BYTES // self._image_bytes))
        self._memory: _SharedBlocks | None = None
        self._idle: deque[_DecodeProcess] = deque()
        self._processes: list[_DecodeProcess] = []
        if processes:
            self._memory = _SharedBlocks(most_images * self._image_bytes)
            try:
                for _ in range(count):
                    self._processes.append(_DecodeProcess(self._memory, shape))
            except OSError as error:
                self.close()
                raise DecodeError(
                    f"no process that decodes images could be started ({error}); reader.decode_in threads needs none"
                ) from error
            finally:
                self._memory.close_file()
            self._idle.extend(2 * self._processes)

    def start(self, payloads: Sequence[bytes]) -> Decoding:
        """Begin to decode a block of images, at most ``most_images``."""
        block = self._memory.take() if self._memory is not None else None
        if block is not None:
            start, flat = block
            images = flat[: len(payloads) * self._image_bytes].reshape(-1, *self._shape)
        else:
            start, images = 0, np.empty((len(payloads), *self._shape), np.uint8)
        parts: list[Future[tuple[int, str] | None]] = []
        for first in range(0, len(payloads), self._piece):
            piece = payloads[first : first + self._piece]
            if block is None:
                parts.append(self._executor.submit(decode_images, piece, images[first : first + len(piece)]))
            else:
                parts.append(self._executor.submit(self._in_process, piece, start + first * self._image_bytes))
        return Decoding(images, parts, self._piece)

    def _in_process(self, payloads: Sequence[bytes], start: int) -> tuple[int, str] | None:
        """As `decode_images`, in one of the processes; twice as many threads as processes call it."""
        process = self._idle.popleft()
        try:
            return process.decode(payloads, start)
        finally:
            self._idle.append(process)

    def close(self) -> None:
        """End threads and processes."""
        self._executor.shutdown(wait=True, cancel_futures=True)
        for process in self._processes:
            process.close_input()
        for process in self._processes:
            process.end()


class Decoding:
    """A block of images that is being decoded."""

    def __init__(self, images: np.ndarray, parts: list[Future[tuple[int, str] | None]], piece: int):
        self._images, self._parts, self._piece = images, parts, piece

    def result(self, damaged: Callable[[int, str], Exception]) -> np.ndarray:
        """Wait for the pixels: uint8 (images, C, H, W).

        Parameters
        ----------
        damaged : number of an image in the block, and what is wrong with it -> the error to raise

        Raises
        ------
        DecodeError
            A process failed.
        """
        for number, part in enumerate(self._parts):
            if (bad := part.result()) is not None:
                raise damaged(number * self._piece + bad[0], bad[1])
        return self._images


class _SharedBlocks:
    """Memory that processes see, in `_BLOCKS` parts. Pages that nobody has written to take no room."""

    def __init__(self, block_bytes: int):
        self.bytes = _BLOCKS * block_bytes
        # No file in /dev/shm, whose size containers limit, and which a killed process would leave behind.
        if hasattr(os, "memfd_create"):
            self.file = os.memfd_create("sparknorm-decoded")
        else:
            with tempfile.TemporaryFile() as file:
                self.file = os.dup(file.fileno())
        os.ftruncate(self.file, self.bytes)
        self._map = mmap.mmap(self.file, self.bytes)
        self._free = deque(range(0, self.bytes, block_bytes)) if block_bytes else deque([0])
        self._block_bytes = block_bytes

    def take(self) -> tuple[int, np.ndarray] | None:
        """A part that nobody uses: its place, and uint8 (bytes,), with which it is given back; None where there is
        none."""
        with contextlib.suppress(IndexError):
            start = self._free.popleft()
            block = np.frombuffer(self._map, np.uint8, self._block_bytes, start)
            weakref.finalize(block, self._free.append, start).atexit = False
            return start, block
        return None

    def close_file(self) -> None:
        """The memory stays, as long as a batch is in it."""
        os.close(self.file)


class _DecodeProcess:
    """One process of `decode_process`. Several threads may ask it: while it answers one, the next request is there."""

    def __init__(self, memory: _SharedBlocks, shape: tuple[int, int, int]):
        # The path as it is here: executors get this package as files that Spark has added to it.
        program = f"import sys; sys.path[:] = {sys.path!r}; from pipeline.data.decode_process import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, (memory.file, memory.bytes, *shape))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=(memory.file,), bufsize=0,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._input, False)  # so that a process that reads nothing is noticed
        with contextlib.suppress(OSError):  # not Linux, or a user with many pipes
            fcntl.fcntl(self._input, _SET_PIPE_SIZE, _PIPE_BYTES)
        self._asking = threading.Lock()
        self._answered = threading.Semaphore()  # of the request before, whose answer comes first
        self._lost = ""  # what is wrong with a process that no longer answers: nobody else waits for it

    def decode(self, payloads: Sequence[bytes], start: int) -> tuple[int, str] | None:
        """As `decode_images`, into the shared memory from ``start`` on.

        Raises
        ------
        DecodeError
            The process failed, has died, or does not answer.
        """
        lengths = [LENGTH.pack(len(payload)) for payload in payloads]
        request = b"".join((REQUEST.pack(len(payloads), start), *lengths, *payloads))
        own = threading.Semaphore(0)
        with self._asking:
            self._write(request)
            before, self._answered = self._answered, own
        before.acquire()
        try:
            number, count = ANSWER.unpack(self._read(ANSWER.size))
            words = self._read(count).decode(errors="replace")
        finally:
            own.release()
        if number == FAILED:
            raise DecodeError(f"a process that decodes images failed: {words.strip()}")
        return None if number < 0 else (number, words)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        with contextlib.suppress(BrokenPipeError):  # its answer says why, or how it ended
            while left:
                self._wait(self._input, select.POLLOUT)
                left = left[os.write(self._input, left) :]

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            self._wait(self._output, select.POLLIN)
            part = os.read(self._output, count - len(data))
            if not part:
                raise DecodeError(f"process {self._process.pid}, which decodes images, {self._end()}")
            data += part
        return data

    def _wait(self, file: int, event: int) -> None:
        poll = select.poll()  # and not `select`, which knows no descriptor above 1,023
        poll.register(file, event)
        if not self._lost and not poll.poll(1000 * _ANSWER_SECONDS):
            self._lost = (
                f"process {self._process.pid}, which decodes images, has not answered for {_ANSWER_SECONDS:g} s"
            )
        if self._lost:
            raise DecodeError(self._lost)

    def _end(self) -> str:
        """How the process ended, in words."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code >= 0:
            return f"ended with exit code {code}: what it wrote is in the log of this worker"
        name = signal.Signals(-code).name
        return f"was ended by {name}" + (", as a machine does that is out of memory" if name == "SIGKILL" else "")

    def close_input(self) -> None:
        """Tell it to end."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def end(self) -> None:
        """Wait until it has ended, or end it."""
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(_END_SECONDS)
        assert self._process.stdout is not None
        self._process.stdout.close()
