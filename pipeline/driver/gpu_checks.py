"""What the GPUs of a gang may make go wrong, from what each rank has seen. Pure functions of plain values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.distributed.gpu_facts import GpuFacts

# With less of its memory free, a GPU serves other processes too: a context and NCCL take a part of this.
FREE_SHARE = 0.8
# What NVIDIA recommends for containers whose processes use NCCL; Docker gives 64 MiB.
SHARED_MEMORY_BYTES = 1 << 30
# Interfaces that lead to no other host.
_LOCAL_INTERFACES = ("lo", "docker", "virbr")
# What may differ between hosts: sparknorm itself sets the first two.
_OF_A_HOST = ("NCCL_SOCKET_IFNAME", "NCCL_SOCKET_FAMILY", "NCCL_IB_HCA", "NCCL_TOPO_FILE")


@dataclass
class GpuVerdict:
    """What was found.

    summary : the GPUs in words
    failures : what ends a training
    doubts : what may become a problem, or makes it slow
    """

    summary: str
    failures: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)


def judge_gpus(ranks: Mapping[int, tuple[str, GpuFacts]], *, bf16: bool) -> GpuVerdict:
    """Look at what the ranks on GPUs have seen.

    Parameters
    ----------
    ranks : host and facts of each rank that has a GPU, at least one
    bf16 : the setting ``train.bf16``
    """
    verdict = GpuVerdict(", ".join(f"rank {rank}: {facts.name} on {host}, {_memory(facts)}"
                                   for rank, (host, facts) in sorted(ranks.items())))  # fmt: skip
    for rank, (host, facts) in sorted(ranks.items()):
        who = f"rank {rank} on {host}"
        _judge_mode(verdict, who, facts.compute_mode)
        if facts.free_bytes < FREE_SHARE * facts.total_bytes:
            verdict.doubts.append(f"{who} has {_memory(facts)}: nvidia-smi shows which processes hold the rest")
        if bf16 and not facts.bf16:
            verdict.doubts.append(
                f"{who}: a {facts.name} has no bfloat16 in hardware, and computes it more slowly than float32: "
                "set train.bf16=false"
            )
    _judge_together(verdict, [facts for _, facts in ranks.values()])
    _judge_ways(verdict, ranks)
    return verdict


def _memory(facts: GpuFacts) -> str:
    return f"{facts.free_bytes / 2**30:.1f} of {facts.total_bytes / 2**30:.1f} GiB free"


def _judge_mode(verdict: GpuVerdict, who: str, mode: str | None) -> None:
    if mode == "Prohibited":
        verdict.failures.append(f"{who}: the GPU's compute mode is Prohibited: nvidia-smi -c DEFAULT")
    elif mode == "Exclusive_Process":
        verdict.doubts.append(
            f"{who}: the GPU's compute mode is Exclusive_Process, and a training that begins while the processes of "
            "the one before still end finds it busy: nvidia-smi -c DEFAULT"
        )


def _judge_together(verdict: GpuVerdict, ranks: Sequence[GpuFacts]) -> None:
    """What must be alike: all ranks go at the pace of the slowest."""
    names = Counter(facts.name for facts in ranks)
    if len(names) > 1:
        kinds = " and ".join(f"{count} {name}" for name, count in sorted(names.items()))
        verdict.doubts.append(f"ranks have {kinds}: all wait for the slowest in every step")
    versions = sorted({facts.nccl for facts in ranks})
    if len(versions) > 1:
        verdict.failures.append(f"ranks have NCCL {' and '.join(versions)}: install one torch everywhere")
    variables = sorted({name for facts in ranks for name in facts.settings if name not in _OF_A_HOST})
    different = [name for name in variables if len({facts.settings.get(name) for facts in ranks}) > 1]
    if different:
        verdict.doubts.append(
            f"{', '.join(different)} differs between ranks: set it by spark.executorEnv.{different[0]}"
        )


def _judge_ways(verdict: GpuVerdict, ranks: Mapping[int, tuple[str, GpuFacts]]) -> None:
    """How ranks reach each other: through shared memory on a host, through an interface between hosts."""
    on_host = Counter(host for host, _ in ranks.values())
    for rank, (host, facts) in sorted(ranks.items()):
        free = facts.shared_memory_bytes
        disabled = facts.settings.get("NCCL_SHM_DISABLE", "0") != "0"
        if on_host[host] > 1 and free is not None and free < SHARED_MEMORY_BYTES and not disabled:
            verdict.doubts.append(
                f"rank {rank} on {host}: {free >> 20} MiB free in /dev/shm for {on_host[host]} ranks of the host: "
                "start the container with --shm-size=1g, or set NCCL_SHM_DISABLE=1"
            )
        if len(on_host) > 1 and (facts.interface or "").startswith(_LOCAL_INTERFACES):
            verdict.doubts.append(
                f"rank {rank} on {host}: NCCL would use {facts.interface}, which leads to no other host: set "
                "spark.executorEnv.NCCL_SOCKET_IFNAME"
            )
