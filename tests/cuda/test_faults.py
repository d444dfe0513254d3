"""One rank that cannot go on beside one that waits for it: the error gets out, soon, and the processes train again."""

import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ranks import outcomes_of_ranks
from small_shards import change_shard, write_dataset

from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.distributed.device import try_device
from pipeline.distributed.leave import AFTER_ERROR_SECONDS
from pipeline.training.job import Job
from pipeline.training.loop import fit

# What a rank may take to fail, beside the time that leaving the group may take. Imports and CUDA are part of it.
BOUND_SECONDS = AFTER_ERROR_SECONDS + 25
LATE_SECONDS = AFTER_ERROR_SECONDS + 10
# What libraries keep of a GPU, and what a rank below has when it runs out of memory.
HELD_BYTES, ALLOCATED_BYTES = 128 << 20, 512 << 20


def make_job(dataset, folder, hook=None, **changes):
    settings = {"epochs": 1, "batch_size": 32, "lanes": 4, "evaluate_on": "train", **changes}
    return Job(
        dataset, str(folder), ModelSettings(network="cnn", depth=3, width=4), TrainSettings(**settings),
        checkpoint=CheckpointSettings(every_steps=5), hook=hook,
    )  # fmt: skip


def steps_of(worker, job):
    return fit(worker, job).steps


def outcomes(shards, tmp_path, device, job):
    """Of a training that fails, and of a small one after it in the same processes."""
    found = outcomes_of_ranks(fit, (job,), steps_of, (make_job(shards, tmp_path / "next"),), device=device.type)
    assert [each.after for each in found] == [16, 16]
    assert all(each.seconds < BOUND_SECONDS for each in found), [each.seconds for each in found]
    assert all(each.held_bytes < HELD_BYTES for each in found), [each.held_bytes for each in found]
    return [each.error for each in found]


def raise_in_step_three(moment):
    if moment.name == "before_data" and moment.step == 3 and moment.worker.rank == 1:
        raise LookupError("a fault of this rank alone")


def test_a_rank_that_raises_beside_one_that_waits(shards, tmp_path, device):
    waiting, failed = outcomes(shards, tmp_path, device, make_job(shards, tmp_path / "job", raise_in_step_three))
    assert "LookupError: a fault of this rank alone\nraised on rank 1 of 2, " in failed
    assert "RuntimeError" in waiting
    assert "raised on rank 0 of 2" in waiting


def fail_beside_a_late_rank(worker):
    """Rank 1 has begun to exchange something when it fails; rank 0 computes for long before it comes to that."""
    values = torch.ones(4, device=worker.device)
    if worker.rank == 0:
        time.sleep(LATE_SECONDS)
        worker.all_reduce_sum(values)
    else:
        worker.all_reduce_start(values)
        raise LookupError("before the exchange had ended")


def sum_of_ranks(worker):
    return worker.all_reduce_sum(torch.full((1,), worker.rank + 1.0, device=worker.device)).item()


def test_a_rank_that_fails_waits_for_no_other(device):
    """torch itself waits until the exchange that was begun has ended, with the error still inside."""
    _, failed = outcomes_of_ranks(fail_beside_a_late_rank, (), sum_of_ranks, (), device=device.type)
    assert "LookupError: before the exchange had ended" in failed.error
    assert failed.seconds < LATE_SECONDS - 1
    assert failed.after == 3


def allocate_too_much(moment):
    if moment.name == "before_data" and moment.step == 2 and moment.worker.rank == 1:
        fits = torch.ones(ALLOCATED_BYTES, dtype=torch.uint8, device=moment.worker.device)
        torch.cat([fits, torch.empty(1 << 50, dtype=torch.uint8, device=fits.device)])


def test_out_of_memory_on_one_rank(shards, tmp_path, device):
    waiting, failed = outcomes(shards, tmp_path, device, make_job(shards, tmp_path / "job", allocate_too_much))
    assert "OutOfMemoryError: out of memory on rank 1 of 2, " in failed
    assert f" {'cuda:0' if device.type == 'cuda' else 'cpu'} (" in failed
    assert "GiB" in failed
    assert "with 16 images at once in data loading, epoch 0, step 2: raise train.accumulate from 1 to 2, " in failed
    assert ("set train.bf16=true" in failed) == (device.type == "cuda")
    assert "lower train.batch_size (32)" in failed
    assert "RuntimeError" in waiting


def test_a_label_without_a_class(shards, tmp_path, device):
    """One error with shard, row, label and rank. On a GPU cross-entropy would end the process's use of the device."""
    dataset = str(tmp_path / "noise")
    write_dataset(dataset, (256, 256), shape=(3, 8, 8), row_group_rows=16)
    labels = np.arange(256) % 3
    labels[35] = 3
    sink = pa.BufferOutputStream()
    table = pa.table({"id": range(256, 512), "label": labels, "image": [bytes(192)] * 256})
    pq.write_table(table, sink, row_group_size=16)
    name = change_shard(dataset, 1, sink.getvalue().to_pybytes())
    errors = outcomes(shards, tmp_path, device, make_job(dataset, tmp_path / "job"))
    text = f"{name}, row group 2: row 3 has label 3, but the dataset has 3 classes, 0 to 2: ingest it again"
    first = next(error for error in errors if "DatasetError" in error)
    assert text in first
    assert "raised on rank " in first


# A device-side assert while NCCL's watchdog looks on, which would end the process by SIGABRT.
POISONED = """
import sys, time, torch, torch.distributed as dist
from datetime import timedelta
from pipeline.distributed.leave import is_reusable
from pipeline.distributed.worker import process_group
device = torch.device("cuda", 0)
store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=60))
started = time.monotonic()
try:
    with process_group(store, 0, 1, device, timedelta(seconds=60)):
        values = torch.ones(4, device=device)
        dist.all_reduce(values)
        torch.nn.functional.cross_entropy(torch.zeros(2, 3, device=device), torch.tensor([1, 7], device=device))
        dist.all_reduce(values, async_op=True)
        time.sleep(3)
        torch.cuda.synchronize()
except RuntimeError as error:
    assert "device-side assert" in str(error), error
    assert error.__notes__, error
    assert not is_reusable()
    assert time.monotonic() - started < 60
    sys.stdout.write("reported")
    sys.stdout.flush()
    import os
    os._exit(7)
"""


def test_an_error_of_the_device_is_raised_and_not_an_abort(cuda):
    done = subprocess.run([sys.executable, "-c", POISONED], capture_output=True, text=True, timeout=150)
    assert (done.returncode, done.stdout) == (7, "reported"), done.stderr


FULL = """
import torch
from pipeline.distributed.worker import alone
torch.cuda.set_per_process_memory_fraction(1e-9)
alone("cuda")
"""


def test_a_device_without_memory_is_named_before_the_start(cuda):
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "RuntimeError: rank 0 cannot use cuda:0 of " in done.stderr
    assert "GiB free" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_a_device_that_is_not_there_is_named_before_the_start():
    with pytest.raises(RuntimeError, match=r"rank 3 cannot use cuda:0 of .* \(its memory cannot be asked for: "):
        try_device(torch.device("cuda", 0), 3)
    try_device(torch.device("cpu"), 3)
