"""What a rank knows of its GPU and of the way to other GPUs, as plain values: `doctor` judges them on the driver."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.distributed.worker import Worker

# Of nvidia-smi, which may hang with its driver.
_SMI_SECONDS = 10
_SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True)
class GpuFacts:
    """What one rank sees.

    name : of the GPU, in torch's words
    free_bytes, total_bytes : of its memory, with what this process already has there
    bf16 : whether it computes bfloat16 in hardware
    compute_mode : as nvidia-smi says it, such as ``Default`` or ``Exclusive_Process``; None where nobody says
    nccl : version of NCCL
    interface : the network interface at which other ranks reach this one; None where nobody knows
    shared_memory_bytes : free in /dev/shm, through which ranks of a host exchange; None where there is none
    settings : the variables of the environment that begin with NCCL_ or TORCH_NCCL_
    """

    name: str
    free_bytes: int
    total_bytes: int
    bf16: bool
    compute_mode: str | None = None
    nccl: str = ""
    interface: str | None = None
    shared_memory_bytes: int | None = None
    settings: dict[str, str] = field(default_factory=dict)


def gpu_facts(worker: Worker) -> GpuFacts | None:
    """What this rank sees; None on CPU."""
    if worker.device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(worker.device)
    free, total = torch.cuda.mem_get_info(worker.device)
    return GpuFacts(
        name=properties.name,
        free_bytes=free,
        total_bytes=total,
        bf16=properties.major >= 8,  # Ampere, the first with bfloat16
        compute_mode=compute_mode_of(_ask_nvidia_smi(), str(properties.uuid)),
        nccl=".".join(map(str, torch.cuda.nccl.version())),
        interface=worker.endpoint.interface if worker.endpoint is not None else None,
        shared_memory_bytes=shutil.disk_usage(_SHARED_MEMORY).free if _SHARED_MEMORY.is_dir() else None,
        settings={name: value for name, value in os.environ.items() if name.startswith(("NCCL_", "TORCH_NCCL_"))},
    )


def compute_mode_of(listed: str, uuid: str) -> str | None:
    """The compute mode of the GPU with a UUID, which torch writes without ``GPU-``. A pure function.

    Parameters
    ----------
    listed : what ``nvidia-smi --query-gpu=uuid,compute_mode --format=csv,noheader`` prints
    """
    for line in listed.splitlines():
        listed_uuid, _, mode = line.partition(",")
        if listed_uuid.strip().removeprefix("GPU-").lower() == uuid.removeprefix("GPU-").lower() and mode.strip():
            return mode.strip()
    return None


def _ask_nvidia_smi() -> str:
    """Lines of UUID and compute mode of each GPU of the host; empty where nvidia-smi is missing or does not answer."""
    command = ["nvidia-smi", "--query-gpu=uuid,compute_mode", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=_SMI_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
