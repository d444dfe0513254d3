"""torch.compile of a network, with an error that says what is missing instead of pages."""

from __future__ import annotations

import os
import shutil

import torch
from torch import nn


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile what calling the model does; names of its parameters stay, and ``model.forward`` stays as it is.

    Raises
    ------
    ValueError
        There is no C++ compiler on a machine whose model is on CPU.
    """
    compiler = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not any(shutil.which(name) for name in (compiler, "clang++")):
        raise ValueError(f"train.compile needs a C++ compiler on every worker: install {compiler}, or set it to false")
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # no pool of processes beside those of the other ranks
    model.compile()
