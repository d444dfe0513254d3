"""Images decoded by processes and by threads: the same pixels, an error with its cause, and no process left behind."""

import array
import fcntl
import os
import signal
import subprocess
import sys
import termios
import time
from contextlib import closing

import numpy as np
import pytest
import torch
from PIL import Image
from small_images import file_of, noise
from small_shards import open_files, write_dataset

from pipeline.config.dataset import ReaderSettings
from pipeline.data import decoders, plan, reader
from pipeline.data.codec import decode_stored
from pipeline.data.decoders import DecodeError, Decoders

SHAPE = (3, 40, 48)


def photo(number, kind="JPEG", shape=SHAPE):
    pixels = noise(shape[1] // 8, shape[2] // 8, 3, seed=number)
    return file_of(Image.fromarray(pixels).resize((shape[2], shape[1])), kind)


def damaged(number, reason):
    return ValueError(f"image {number}: {reason}")


def decoders_of(*, processes=True, count=2, most_images=64, shape=SHAPE):
    return closing(Decoders(shape, count=count, most_images=most_images, processes=processes))


@pytest.mark.parametrize("processes", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_pixels_are_those_of_pillow_in_the_order_of_the_payloads(processes, count, monkeypatch):
    monkeypatch.setattr(decoders, "_PIECE_BYTES", 5 * 3 * 40 * 48)  # several pieces a block
    payloads = [photo(number, ("JPEG", "PNG")[number % 2]) for number in range(40)]
    with decoders_of(processes=processes, count=count) as made:
        blocks = [made.start(payloads[:size]) for size in (40, 1, 0, 23)]
        for block, size in zip(blocks, (40, 1, 0, 23), strict=True):
            images = block.result(damaged)
            assert images.shape == (size, *SHAPE)
            for image, payload in zip(images, payloads, strict=False):
                np.testing.assert_array_equal(image, decode_stored(payload, "jpeg", SHAPE))


@pytest.mark.parametrize("processes", [True, False])
def test_grey_images(processes):
    payloads = [file_of(Image.fromarray(noise(9, 7, seed=number)), "PNG") for number in range(5)]
    with decoders_of(processes=processes, shape=(1, 9, 7)) as made:
        np.testing.assert_array_equal(
            made.start(payloads).result(damaged)[:, 0], [noise(9, 7, seed=number) for number in range(5)]
        )


@pytest.mark.parametrize("processes", [True, False])
def test_a_damaged_image_is_named_by_its_number_and_the_rest_goes_on(processes, monkeypatch):
    monkeypatch.setattr(decoders, "_PIECE_BYTES", 4 * 3 * 40 * 48)
    payloads = [photo(number) for number in range(20)]
    cut = [*payloads[:13], payloads[13][:-400], *payloads[14:]]
    with decoders_of(processes=processes) as made:
        bad, good = made.start(cut), made.start(payloads)
        with pytest.raises(ValueError, match="image 13: truncated"):
            bad.result(damaged)
        assert good.result(damaged).shape == (20, *SHAPE)
        with pytest.raises(ValueError, match="image 0: wrong_size"):
            made.start([photo(0, shape=(3, 40, 56))]).result(damaged)


def test_a_block_stays_as_it_is_as_long_as_anything_of_it_is_kept():
    """More blocks than there are parts of the shared memory; views of views; memory is given back once none is left."""
    payloads = [photo(number) for number in range(8)]
    expected = [decode_stored(payload, "jpeg", SHAPE) for payload in payloads]
    with decoders_of(most_images=8) as made:
        kept = []
        for turn in range(20):
            order = np.roll(np.arange(8), turn)
            images = torch.from_numpy(made.start([payloads[i] for i in order]).result(damaged))
            kept.append((order[3], images[2:5].view(3, -1)[1]))
        for number, image in kept:
            np.testing.assert_array_equal(image.numpy(), expected[number].ravel())
        assert made._memory.take() is None
        del kept, image, images
        assert made._memory.take() is not None


def test_images_outlive_their_decoders():
    payloads = [photo(number) for number in range(8)]
    with decoders_of() as made:
        images = made.start(payloads).result(damaged)
    np.testing.assert_array_equal(images[7], decode_stored(payloads[7], "jpeg", SHAPE))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_dies_is_an_error_with_its_cause(end):
    payloads = [photo(number) for number in range(8)]
    with decoders_of(count=1) as made:
        made.start(payloads).result(damaged)
        os.kill(made._processes[0]._process.pid, end)
        with pytest.raises(DecodeError, match=rf"process \d+, which decodes images, was ended by {end.name}"):
            made.start(payloads).result(damaged)


def test_a_process_that_cannot_start_says_why(monkeypatch):
    monkeypatch.setattr(sys, "path", [path for path in sys.path if "site-packages" not in path])
    with decoders_of(count=1) as made, pytest.raises(DecodeError, match=r"(?s)failed: .*No module named"):
        made.start([photo(0)]).result(damaged)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(DecodeError, match=r"could be started .*reader\.decode_in threads needs none"):
        Decoders(SHAPE, count=1, most_images=1, processes=True)


def test_a_process_that_does_not_answer_is_an_error(monkeypatch):
    monkeypatch.setattr(decoders, "_ANSWER_SECONDS", 4.0)
    monkeypatch.setattr(decoders, "_END_SECONDS", 0.5)
    with decoders_of(count=1) as made:
        process = made._processes[0]._process
        os.kill(process.pid, signal.SIGSTOP)
        started = time.monotonic()
        for block in [made.start([photo(number)]) for number in range(5)]:
            with pytest.raises(DecodeError, match=r"has not answered for 4 s"):
                block.result(damaged)
        assert time.monotonic() - started < 8  # all wait as long as the first, and not one after the other
    assert process.returncode == -signal.SIGKILL


def test_the_next_request_is_there_before_a_process_has_answered():
    """So that it does not wait for a thread of this process, which waits for the interpreter lock."""
    payloads = [photo(number) for number in range(8)]
    with decoders_of(count=1) as made:
        blocks = [made.start(payloads)]
        blocks[0].result(damaged)
        process = made._processes[0]
        os.kill(process._process.pid, signal.SIGSTOP)
        blocks += [made.start(payloads), made.start(payloads[::-1])]
        until, sent = time.monotonic() + 10, array.array("i", [0])
        while sent[0] < 2 * sum(map(len, payloads)) and time.monotonic() < until:
            time.sleep(0.01)
            fcntl.ioctl(process._input, termios.FIONREAD, sent)
        os.kill(process._process.pid, signal.SIGCONT)
        assert sent[0] > 2 * sum(map(len, payloads))
        first, second = (block.result(damaged) for block in blocks[1:])
    np.testing.assert_array_equal(first, second[::-1])
    np.testing.assert_array_equal(first, blocks[0].result(damaged))


_RANK = """
import os, sys, threading
import torch
from pipeline.config.dataset import ReaderSettings
from pipeline.data import load_manifest, plan, reader
from pipeline.data.shards import SplitFiles
torch.randn(500, 500) @ torch.randn(500, 500)  # its threads are there
files = SplitFiles(sys.argv[1], load_manifest(sys.argv[1]), "train", ReaderSettings())
planned = plan.plan_epoch(files.group_rows, lanes=2, batch_size=8, shuffle_row_groups=1, seed=0, epoch=0)
for batch in reader.train_batches(files, lambda _: planned, range(2), epochs=10**6):
    print("batch", flush=True)
    if sys.argv[2] == "wait":
        threading.Event().wait()
"""


def _children(parent):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True, check=False, timeout=30
    )
    return [int(line) for line in listed.stdout.split()]


def _is_there(pid):
    """Whether a process runs; one that has ended, and whose end nobody has asked for, does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout
    return bool(state.strip()) and not state.startswith("Z")


@pytest.mark.parametrize("how", ["wait", "go on"])
def test_no_process_is_left_where_a_rank_is_killed(tmp_path, how):
    write_dataset(str(tmp_path), (100,) * 2, shape=SHAPE, encoding="jpeg")
    rank = subprocess.Popen([sys.executable, "-c", _RANK, str(tmp_path), how], stdout=subprocess.PIPE, text=True)
    try:
        assert rank.stdout.readline() == "batch\n"
        children = _children(rank.pid)
        assert len(children) == 2
    finally:
        rank.kill()
        rank.wait(10)
        rank.stdout.close()
    until = time.monotonic() + 10
    while any(map(_is_there, children)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(_is_there, children))


def test_threads_and_processes_make_the_same_batches(tmp_path):
    write_dataset(str(tmp_path), (100,) * 2, shape=SHAPE, encoding="jpeg")
    made = []
    for decode_in in ("processes", "threads"):
        files = open_files(str(tmp_path), decode_in=decode_in, memory_bytes=0)

        def plan_of(epoch, rows=files.group_rows):
            return plan.plan_epoch(rows, lanes=2, batch_size=16, shuffle_row_groups=1, seed=3, epoch=epoch)

        made.append(list(reader.train_batches(files, plan_of, range(2), epochs=2)))
    assert len(made[0]) == len(made[1]) > 20
    for a, b in zip(*made, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_the_setting_says_what_there_is():
    assert ReaderSettings().decode_in == "processes"
    with pytest.raises(ValueError, match="'processes' or 'threads'"):
        ReaderSettings(decode_in="fibres")
