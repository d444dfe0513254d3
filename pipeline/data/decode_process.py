"""A process that decodes images for a rank, so that no decoding waits for, or holds, the interpreter lock of training.

It is a program of its own and no fork: a rank has threads of torch, perhaps a GPU, and may be a daemon's child that
must have none of its own. It needs numpy and Pillow, uses simplejpeg where that is installed, and no torch. Requests
come on standard input, answers leave on standard output in their order, pixels go to memory that both processes see. It
ends when standard input does: a rank that is killed leaves none behind.
"""

from __future__ import annotations

import mmap
import os
import select
import signal
import struct
import sys
import traceback

# A request: how many images, and where in the shared memory they go; then the bytes of each, then the payloads.
REQUEST = struct.Struct("<IQ")
LENGTH = struct.Struct("<I")
# An answer: the number of the image that is bad, and the bytes of the words that follow.
ANSWER = struct.Struct("<iI")
GOOD, FAILED = -1, -2
# Seconds between two looks at whether the rank lives: another process may have inherited the other end of the pipe.
_PARENT_SECONDS = 5.0


def serve(memory_file: int, memory_bytes: int, shape: tuple[int, int, int]) -> None:
    """Answer requests until standard input ends.

    Parameters
    ----------
    memory_file : descriptor of the memory that pixels go to
    memory_bytes : its size
    shape : (C, H, W) of every image
    """
    import numpy as np

    from pipeline.data.codec import decode_images

    memory = np.frombuffer(mmap.mmap(memory_file, memory_bytes), np.uint8)
    image_bytes = int(np.prod(shape))
    parent = os.getppid()
    while header := _read(REQUEST.size, parent):
        count, start = REQUEST.unpack(header)
        lengths = [length for (length,) in LENGTH.iter_unpack(_read(count * LENGTH.size, parent))]
        content = memoryview(_read(sum(lengths), parent))
        payloads = []
        for length in lengths:
            payloads.append(content[:length])
            content = content[length:]
        target = memory[start : start + count * image_bytes].reshape(count, *shape)
        number, reason = decode_images(payloads, target) or (GOOD, "")
        _answer(number, reason)


def _read(count: int, parent: int) -> bytearray:
    """So many bytes of standard input; none where it has ended, or the process that started this one has."""
    data = bytearray(count)
    left = memoryview(data)
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while left:
        if not poll.poll(1000 * _PARENT_SECONDS):
            if os.getppid() != parent:
                return bytearray()
            continue
        got = os.readv(0, [left])
        if not got:
            return bytearray()
        left = left[got:]
    return data


def _answer(number: int, words: str) -> None:
    text = words.encode()
    os.write(1, ANSWER.pack(number, len(text)) + text)


def main() -> None:
    """The program: arguments are descriptor and bytes of the shared memory, then C, H, W."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the rank, whose end ends this process
    try:
        memory_file, memory_bytes, *shape = map(int, sys.argv[1:])
        serve(memory_file, memory_bytes, (shape[0], shape[1], shape[2]))
    except BrokenPipeError:
        return  # the rank has ended
    except BaseException:  # noqa: BLE001 - told to the rank, which raises it
        _answer(FAILED, traceback.format_exc(limit=-3))


if __name__ == "__main__":
    main()
