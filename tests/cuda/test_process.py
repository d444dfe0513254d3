"""What a process does with a GPU around a training: forks, process groups that are joined and left."""

import multiprocessing
import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed.gpu_facts import gpu_facts
from pipeline.distributed.worker import Worker, alone, process_group

# What Spark's daemon of Python workers imports before it forks them.
FORK = """
import os, sys, torch
import pipeline.training.loop, pipeline.cluster.rendezvous, pipeline.cluster.task, pipeline.distributed.gradients
import torch._dynamo, torch.nn.parallel, torch.distributed.algorithms.ddp_comm_hooks.default_hooks, torch.utils.data
assert not torch.cuda.is_initialized(), "the imports have initialised CUDA"
pid = os.fork()
if pid == 0:
    os._exit(0 if torch.ones(3, device=sys.argv[1]).sum().item() == 3 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_a_fork_can_use_the_device(device):
    done = subprocess.run([sys.executable, "-c", FORK, device.type], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def join_and_leave(times, device_type):
    """Sums over a world of one, by the backend of the device, in one process group after another."""
    device, sums = torch.device(device_type, 0), []
    for _ in range(times):
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=60))
        with process_group(store, 0, 1, device, timedelta(seconds=60)):
            worker = Worker(0, 1, 0, 1, device, "localhost")
            values = torch.ones(4, device=device)
            dist.all_reduce(values)
            worker.wait_for_all()
            dist.barrier()
            sums.append(values.sum().item())
            backend = dist.get_backend()
    return sums, backend


def test_a_process_joins_one_group_after_another(device):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        sums, backend = pool.apply_async(join_and_leave, (3, device.type)).get(timeout=120)
    assert sums == [4.0] * 3
    assert backend == ("nccl" if device.type == "cuda" else "gloo")


def join_after_errors(times, device_type):
    """Leave one group after another by an error, and join a last one: the notes of each error, and a sum."""
    device, errors, total = torch.device(device_type, 0), [], 0.0
    for attempt in range(times + 1):
        store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=60))
        try:
            with process_group(store, 0, 1, device, timedelta(seconds=60)):
                values = torch.ones(4, device=device)
                dist.all_reduce(values)
                if attempt < times:
                    raise LookupError("of the caller")
                total = values.sum().item()
        except LookupError as error:
            errors.append(error.__notes__)
    return errors, total


def test_a_process_joins_a_group_after_it_left_one_by_an_error(device):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        notes, total = pool.apply_async(join_after_errors, (2, device.type)).get(timeout=120)
    assert total == 4.0
    assert [len(each) for each in notes] == [1, 1]
    assert all(each[0].startswith("raised on rank 0 of 1, ") for each in notes)


# A rank finds the GPU that Spark assigned to its task by its UUID, whatever part of the host's GPUs it is shown.
BY_UUID = """
import sys, torch
from pipeline.distributed.device import choose_device, try_device
chosen = choose_device("cuda", sys.argv[1], 0)
try_device(chosen, 0)
assert chosen == torch.device("cuda", 0), chosen
assert torch.cuda.current_device() == 0
print("GPU-" + str(torch.cuda.get_device_properties(chosen).uuid))
"""


@pytest.mark.parametrize("visible", [None, "0", "UUID"])
def test_a_rank_finds_its_gpu_by_uuid(visible, cuda):
    uuid = f"GPU-{torch.cuda.get_device_properties(cuda).uuid}"
    shown = {} if visible is None else {"CUDA_VISIBLE_DEVICES": uuid if visible == "UUID" else visible}
    others = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", BY_UUID, uuid], env=others | shown, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == uuid


def test_what_a_rank_tells_doctor_of_its_gpu(device):
    facts = gpu_facts(alone(device.type))
    if device.type == "cpu":
        assert facts is None
        return
    assert facts.name == torch.cuda.get_device_name(0)
    assert 0 < facts.free_bytes <= facts.total_bytes
    assert facts.bf16 == torch.cuda.is_bf16_supported(including_emulation=False)
    assert facts.nccl.startswith("2.")
    assert facts.compute_mode in (None, "Default", "Exclusive_Process")
    assert facts.shared_memory_bytes is None or facts.shared_memory_bytes > 0
