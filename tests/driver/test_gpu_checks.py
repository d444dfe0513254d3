"""What `doctor` says of GPUs, for facts as ranks report them."""

from dataclasses import replace

import pytest

from pipeline.distributed.gpu_facts import GpuFacts, compute_mode_of
from pipeline.driver.doctor import CheckFailedError, DoubtfulError, check_gpus
from pipeline.driver.gpu_checks import judge_gpus
from pipeline.training.probe import WorkerReport

GIB = 1 << 30
WELL = GpuFacts(
    name="NVIDIA H100", free_bytes=78 * GIB, total_bytes=80 * GIB, bf16=True, compute_mode="Default", nccl="2.28.9",
    interface="eth0", shared_memory_bytes=16 * GIB, settings={"NCCL_IB_DISABLE": "1"},
)  # fmt: skip
OLD = replace(WELL, name="Tesla T4", bf16=False, free_bytes=15 * GIB, total_bytes=16 * GIB)


def report(rank, host, facts):
    return WorkerReport(rank, host, "3.11", f"cuda:{rank}", str(rank), None, None, GIB, 0.0, (), None, facts)


def test_gpus_without_a_doubt_are_described():
    told = check_gpus([report(0, "a", WELL), report(1, "b", WELL)], bf16=True)
    assert told.startswith("rank 0: cuda:0 (0), rank 1: cuda:1 (1); ")
    assert "rank 1: NVIDIA H100 on b, 78.0 of 80.0 GiB free" in told
    eth1 = replace(WELL, settings={**WELL.settings, "NCCL_SOCKET_IFNAME": "=eth1"})
    assert judge_gpus({0: ("a", WELL), 1: ("b", eth1)}, bf16=True).doubts == []
    assert check_gpus([report(0, "a", None)], bf16=True) == "rank 0: cuda:0 (0)"


@pytest.mark.parametrize(("facts", "doubt"), [
    ([replace(WELL, free_bytes=63 * GIB)], "rank 0 on a has 63.0 of 80.0 GiB free: nvidia-smi shows which processes"),
    ([replace(WELL, compute_mode="Exclusive_Process")], "rank 0 on a: the GPU's compute mode is Exclusive_Process"),
    ([OLD], "rank 0 on a: a Tesla T4 has no bfloat16 in hardware"),
    ([WELL, replace(OLD, bf16=True)], "ranks have 1 NVIDIA H100 and 1 Tesla T4: all wait for the slowest"),
    ([WELL, replace(WELL, settings={})], "NCCL_IB_DISABLE differs between ranks: set it by spark.executorEnv.NCCL_IB_"),
    ([WELL, replace(WELL, shared_memory_bytes=64 << 20)],
     "rank 1 on a: 64 MiB free in /dev/shm for 2 ranks of the host: start the container with --shm-size=1g"),
])  # fmt: skip
def test_each_doubt_names_rank_and_remedy(facts, doubt):
    reports = [report(rank, "a", each) for rank, each in enumerate(facts)]
    with pytest.raises(DoubtfulError) as raised:
        check_gpus(reports, bf16=True)
    assert doubt in str(raised.value)
    assert str(raised.value).count("; ") == 0  # nothing else is doubted


def test_an_interface_that_leads_nowhere_matters_between_hosts_alone():
    lost = replace(WELL, interface="docker0")
    assert judge_gpus({0: ("a", lost), 1: ("a", lost)}, bf16=True).doubts == []
    doubts = judge_gpus({0: ("a", WELL), 1: ("b", lost)}, bf16=True).doubts
    assert doubts == ["rank 1 on b: NCCL would use docker0, which leads to no other host: set "
                      "spark.executorEnv.NCCL_SOCKET_IFNAME"]  # fmt: skip


def test_little_shared_memory_matters_to_ranks_that_use_it_alone():
    small = replace(WELL, shared_memory_bytes=64 << 20)
    assert judge_gpus({0: ("a", small), 1: ("b", small)}, bf16=True).doubts == []
    without = replace(small, settings={"NCCL_SHM_DISABLE": "1"})
    assert judge_gpus({0: ("a", without), 1: ("a", without)}, bf16=True).doubts == []
    assert judge_gpus({0: ("a", OLD)}, bf16=False).doubts == []


@pytest.mark.parametrize(("facts", "failure"), [
    ([replace(WELL, compute_mode="Prohibited")], "rank 0 on a: the GPU's compute mode is Prohibited"),
    ([WELL, replace(WELL, nccl="2.27.3")], "ranks have NCCL 2.27.3 and 2.28.9: install one torch everywhere"),
])  # fmt: skip
def test_what_ends_a_training_is_a_failure(facts, failure):
    with pytest.raises(CheckFailedError, match=failure):
        check_gpus([report(rank, "a", each) for rank, each in enumerate(facts)], bf16=True)


def test_the_compute_mode_is_that_of_the_rank_s_own_gpu():
    listed = "GPU-aaaa-1, Default\nGPU-BBBB-2, Exclusive_Process\nGPU-cccc-3, \n"
    assert compute_mode_of(listed, "aaaa-1") == "Default"
    assert compute_mode_of(listed, "GPU-bbbb-2") == "Exclusive_Process"
    assert compute_mode_of(listed, "cccc-3") is None
    assert compute_mode_of("", "aaaa-1") is None
