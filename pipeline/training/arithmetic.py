"""How the kernels of a GPU compute during one training: which ones are chosen, how exact, whether always the same."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from pipeline.config.training import TrainSettings

# With one of these two, products of cuBLAS have the same bits in every run (its documentation, "Results
# Reproducibility"). torch looks once in a process, at the first product, so that it is set for every training: one that
# is to be deterministic may come after one that is not. It is 32 MiB of workspace, as cuBLAS itself takes on Hopper.
_WORKSPACES = "CUBLAS_WORKSPACE_CONFIG"
_REPRODUCIBLE = ":4096:8"


@contextmanager
def arithmetic(device: torch.device, train: TrainSettings) -> Iterator[None]:
    """Make CUDA compute as a training's settings say within the block, and as before after it. Nothing on CPU.

    With ``train.deterministic`` two trainings on one kind of GPU have the same bits; an operation that has no such
    kernel raises RuntimeError and is named. Else convolutions are tried out once, and the fastest kernel is taken.
    """
    if device.type != "cuda":
        yield
        return
    cudnn, products = torch.backends.cudnn, torch.backends.cuda.matmul
    os.environ.setdefault(_WORKSPACES, _REPRODUCIBLE)
    before = cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32, torch.are_deterministic_algorithms_enabled()
    filling: Any = torch.utils.deterministic
    fills = filling.fill_uninitialized_memory
    cudnn.benchmark = not train.deterministic  # all batches of a training have one size
    cudnn.allow_tf32 = products.allow_tf32 = train.tf32
    if train.deterministic:
        torch.use_deterministic_algorithms(True)
        # It would fill each tensor that is made, at every step: a help to find who reads what was never written.
        filling.fill_uninitialized_memory = False
    try:
        yield
    finally:
        cudnn.benchmark, cudnn.allow_tf32, products.allow_tf32, deterministic = before
        torch.use_deterministic_algorithms(deterministic)
        filling.fill_uninitialized_memory = fills
