import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.worker import alone, choose_device, process_group

SCRIPT = """
import os
import torch
from pipeline.distributed.worker import from_torchrun
with from_torchrun("cpu", timeout_seconds=60) as worker:
    total = worker.all_reduce_sum(torch.tensor([1.0 + worker.rank]))
    worker.wait_for_all()
    said = f"rank {worker.rank} of {worker.world_size} local {worker.local_rank}: {total.item()}\\n"
    os.write(1, said.encode())  # one write: the ranks share the pipe, and print() writes a line and its end separately
"""


def test_torchrun_makes_workers(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 local 0: 3.0", "rank 1 of 2 local 1: 3.0"]


def test_alone_needs_no_process_group():
    worker = alone("cpu")
    assert (worker.rank, worker.world_size, worker.device.type) == (0, 1, "cpu")
    assert worker.all_reduce_sum(torch.tensor(2.0)) == 2
    worker.wait_for_all()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
def test_cuda_without_a_device_is_an_error():
    assert choose_device("auto", None, 0).type == "cpu"
    with pytest.raises(ValueError, match=r"workers.device is cuda, but torch sees no CUDA device"):
        choose_device("cuda", None, 0)
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        choose_device("auto", "0", 0)


def test_which_gpu_a_rank_takes(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert choose_device("auto", "1", 0) == torch.device("cuda", 1)  # what Spark assigned
    assert choose_device("cuda", None, 1) == torch.device("cuda", 1)  # else one for each local rank
    assert choose_device("cpu", "1", 0).type == "cpu"
    with pytest.raises(ValueError, match=r"GPU 2 was asked for, but .* has 2"):
        choose_device("cuda", None, 2)


@pytest.mark.parametrize("users", [None, "1"])
def test_the_watchdog_of_nccl_lets_errors_out_unless_the_user_decides(monkeypatch, users):
    name = "TORCH_NCCL_RETHROW_CUDA_ERRORS"
    monkeypatch.delenv(name, raising=False)
    if users is not None:
        monkeypatch.setenv(name, users)
    minute = timedelta(seconds=60)
    for error in (None, LookupError("of the caller")):
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=minute)
        try:
            with process_group(store, 0, 1, torch.device("cpu"), minute):
                assert os.environ[name] == (users or "0")
                if error is not None:
                    raise error
        except LookupError as raised:
            assert raised is error
        assert os.environ.get(name) == users
        assert not dist.is_initialized()
