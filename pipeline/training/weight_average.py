"""An exponential moving average of the weights, which is often better than the last ones (Polyak & Juditsky 1992)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class WeightAverage:
    """average = d * average + (1 - d) * weights after each optimizer step; ranks, whose weights are equal, agree.

    In the first steps d is (1 + t) / (10 + t) where that is below ``decay``: the average must not remember the
    initial weights. Norm layers keep no running statistics of an averaged network: recompute them over batches
    (`norm_statistics.precise`).
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._weights = dict(model.named_parameters())
        self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}
        first = {weight: name for name, weight in self._weights.items()}
        self._names = {name: first[weight] for name, weight in model.named_parameters(remove_duplicate=False)}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after ``step`` optimizer steps to the average."""
        decay = min(self._decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self._average.values()), list(self._weights.values()), 1 - decay)

    @contextmanager
    def in_place_of_weights(self) -> Iterator[None]:
        """Make the model's parameters the average within the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self._weights.items():
            trained = weight.clone()
            weight.copy_(self._average[name])
            self._average[name].copy_(trained)

    def state(self) -> dict[str, torch.Tensor]:
        """The average of each parameter, by each of its names; not copies."""
        return {name: self._average[first] for name, first in self._names.items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, torch.Tensor]) -> None:
        for name, value in self._average.items():
            value.copy_(state[name])
