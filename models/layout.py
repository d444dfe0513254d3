"""How the tensors of a network lie in memory."""

from __future__ import annotations

import torch
from torch import nn


def lay_out(network: nn.Module, memory_format: torch.memory_format) -> None:
    """Bring the parameters and buffers of a network that have 4 axes, in place, into a memory format.

    ``network.to(memory_format=torch.channels_last)`` is refused where it has some with 5, as `torch.nn.Conv3d` does.
    """
    network._apply(lambda tensor: tensor.to(memory_format=memory_format) if tensor.ndim == 4 else tensor)
