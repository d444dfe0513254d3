"""Statistics of each layer: the norm of its gradient, the distribution of what enters a nonlinearity, and how far the
statistics of a batch are from those that a norm layer evaluates with.

Hooks exist only inside the ``watching`` blocks, and change nothing that passes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from models.activations import ACTIVATIONS
from models.hooks import before_forward
from models.norms.base import RunningNorm
from models.recompute import is_recomputing
from pipeline.distributed.worker import Worker
from pipeline.training import norm_statistics

# Of a unit's inputs (Ioffe & Szegedy 2015, figure 1).
PERCENTILES = (15, 50, 85)
# A unit is dead, or saturated, where the derivative of its nonlinearity is below this for every input.
DEAD_DERIVATIVE = 1e-3
# What torch.quantile takes.
_MOST_VALUES = 2**24

# Scalars on the device, by name.
Values = dict[str, torch.Tensor]


@torch.no_grad()
def gradient_norms(model: nn.Module) -> Values:
    """The L2 norm of ``.grad`` of the parameters that a module has itself, for each module that has some."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradients.setdefault(name.rpartition(".")[0] or "network", []).append(parameter.grad.double().norm())
    return {f"gradient_norm/{layer}": torch.stack(norms).norm() for layer, norms in gradients.items()}


class ActivationStatistics:
    """Sums up the inputs of each nonlinearity (the modules of `ACTIVATIONS`) over all passes of a batch.

    A channel is axis 1, of sequences (N, T, D) the last axis. Its mean and variance are those over all rows and
    positions of the global batch, and so is whether it is dead: they do not depend on the number of ranks. The values
    of a layer are means over its channels:

    - ``activation_mean``, ``activation_variance``
    - ``activation_drift``: |mean - mean_before| / std_before, since the look before: the internal covariate shift of
      Ioffe & Szegedy (2015)
    - ``activation_variance_ratio``: of the variance to that before; the geometric mean
    - ``dead_units``: share of channels in which the derivative of the nonlinearity is below 0.001 for every input: of a
      ReLU, those that are 0 for the whole batch; of a sigmoid or tanh, the saturated ones
    - ``input_percentile_15``, ``_50``, ``_85``, of the last nonlinearity alone: of its first channel, one unit, as in
      figure 1 there; means over ranks

    A channel without variance before is left out of the drift, and one without before or now of the ratio. The first
    look of an attempt has neither.
    """

    def __init__(self, worker: Worker):
        self._worker = worker
        self._sums: dict[str, torch.Tensor] = {}
        self._unit: dict[str, list[torch.Tensor]] = {}
        self._last = ""
        self._before: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        self._sums, self._unit = {}, {}
        kinds = tuple(ACTIVATIONS.values())
        activations = [(name, module) for name, module in model.named_modules() if type(module) in kinds]
        hooks = [before_forward(module, self._adding(name or "network")) for name, module in activations]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adding(self, name: str) -> Callable[[nn.Module, Any], None]:
        def add(module: nn.Module, inputs: torch.Tensor) -> None:
            if is_recomputing():  # these inputs were here already
                return
            x = inputs.detach()
            x = (x if x.dtype == torch.float64 else x.float()).movedim(2 if x.ndim == 3 else 1, -1).flatten(0, -2)
            # On CPU sums over rows are several times faster than torch.var_mean and torch.any.
            mean = x.mean(0)
            variance = (x - mean).square().mean(0).double()
            alive = (_derivative(module, x).abs() >= DEAD_DERIVATIVE).to(x.dtype).sum(0).double()
            mean = mean.double()
            new = torch.cat([mean * len(x), (variance + mean**2) * len(x), alive, mean.new_full((1,), len(x))])
            # One module in several places is told apart by their channels, where these differ.
            same = name not in self._sums or len(self._sums[name]) == len(new)
            place = name if same else f"{name} of {x.shape[1]} channels"
            self._sums[place] = self._sums[place] + new if place in self._sums else new
            self._unit.setdefault(place, []).append(x[:, 0].clone())
            self._last = place

        return add

    @torch.no_grad()
    def take(self) -> Values:
        """The statistics of what passed since `watching` began, by name. Every rank calls it and gets the same."""
        values: Values = {}
        if not self._sums:
            return values
        flat = self._worker.all_reduce_sum(torch.cat(list(self._sums.values())))
        for name, sums in zip(self._sums, flat.split([len(values) for values in self._sums.values()]), strict=True):
            first, second, alive = sums[:-1].chunk(3)
            mean = first / sums[-1]
            variance = (second / sums[-1] - mean**2).clamp(min=0)
            values[f"activation_mean/{name}"], values[f"activation_variance/{name}"] = mean.mean(), variance.mean()
            values[f"dead_units/{name}"] = (alive == 0).double().mean()
            if name in self._before:
                mean_before, before = self._before[name]
                values[f"activation_drift/{name}"] = _mean((mean - mean_before).abs() / before.sqrt())
                values[f"activation_variance_ratio/{name}"] = _mean((variance / before).log()).exp()
            self._before[name] = mean, variance
        unit = torch.cat(self._unit[self._last])
        unit = unit[:: -(-len(unit) // _MOST_VALUES)]
        shares = torch.tensor([percent / 100 for percent in PERCENTILES], dtype=unit.dtype, device=unit.device)
        percentiles = self._worker.all_reduce_sum(unit.quantile(shares).double()) / self._worker.world_size
        names = [f"input_percentile_{percent}/{self._last}" for percent in PERCENTILES]
        self._sums, self._unit = {}, {}
        return values | dict(zip(names, percentiles, strict=True))


def _derivative(activation: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Of a function of each element."""
    # What this keeps is none of what a block keeps that is computed again (`models.recompute`).
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_as_it_is, _as_it_is):
        point = x.detach().requires_grad_()
        # ``forward`` runs no hooks; an activation that works in place must not change what it gets.
        return torch.autograd.grad(activation.forward(point.clone()).sum(), point)[0]


def _as_it_is(kept: torch.Tensor) -> torch.Tensor:
    return kept


def _mean(values: torch.Tensor) -> torch.Tensor:
    """Of those that are finite."""
    return values.where(values.isfinite(), torch.nan).nanmean()


class StatisticsGap:
    """Sums up how far batches of an evaluation are from the statistics of each norm layer: `Diagnostics.evaluation`."""

    def __init__(self, model: nn.Module, batches: int):
        self._layers, self._batches = norm_statistics.layers(model), batches
        self._gaps: dict[str, list[torch.Tensor]] = {name: [] for name in self._layers}

    @contextmanager
    def watching(self) -> Iterator[None]:
        hooks = [before_forward(layer, self._adding(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _adding(self, name: str) -> Callable[[Any, Any], None]:
        @torch.no_grad()
        def add(layer: RunningNorm, x: torch.Tensor) -> None:
            gaps = self._gaps[name]
            if layer.training or len(gaps) == self._batches:
                return
            mean, square = (value.double().clone() for value in layer.population())  # not the buffers themselves
            x = x if x.dtype == torch.float64 else x.float()
            variance, mean_of_batch = torch.var_mean(x, [0, *range(2, x.ndim)])
            with norm_statistics.preserve_buffers(layer):
                layer.set_population(mean_of_batch, variance)  # in the terms of this kind of layer
                mean_batch, square_batch = (value.double() for value in layer.population())
                far = ((mean_batch - mean).abs() / square.sqrt()).mean()
                gaps.append(torch.stack([far, (square_batch / square).log().abs().mean()]))

        return add

    def take(self, worker: Worker) -> Values:
        """The mean gaps of each layer, by name. Every rank calls it; one that saw no batch counts for nothing."""
        if not self._layers:
            return {}
        sums = torch.zeros(len(self._layers), 3, dtype=torch.float64, device=worker.device)
        for row, gaps in zip(sums, self._gaps.values(), strict=True):
            if gaps:
                row[:2], row[2] = torch.stack(gaps).sum(0), len(gaps)
        worker.all_reduce_sum(sums)
        means = (sums[:, :2] / sums[:, 2:]).T
        kinds = ("statistics_gap_mean", "statistics_gap_variance")
        return {
            f"{kind}/{name}": value
            for kind, row in zip(kinds, means, strict=True)
            for name, value in zip(self._layers, row, strict=True)
        }
