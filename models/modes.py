"""Whether the modules of a network train or evaluate: some authors put a part into evaluation mode for good."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode within the block; afterwards each module has the mode that it had before."""
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        network.train(modes[network])  # a ``train`` of the author's own may do more than to set the mode
        for module, mode in modes.items():
            module.training = mode
