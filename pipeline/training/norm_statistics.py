"""Statistics of norm layers, which each rank gathers in training and evaluation needs of all ranks together.

Networks know no ranks: `connect` tells batch norm which rows of a batch belong together. In training each rank keeps
its running statistics; evaluation uses those of all ranks (`of_all_ranks`), or exact ones (`precise`), and leaves the
rank's untouched, so that no training depends on how often it is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from models.freeze import Frozen
from models.hooks import before_forward
from models.modes import evaluating
from models.norms.base import RunningNorm
from models.norms.batch import BatchNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.power import PowerNorm
from pipeline.distributed.worker import Worker


def connect(model: nn.Module, worker: Worker, *, lanes: int, parts: int = 1) -> None:
    """Tell batch norm by lane the number of lanes in each batch of this rank, batch norm by world how to sum, and norms
    with a warm-up in how many parts, which are forward passes, each step computes its batch."""
    for module in model.modules():
        if isinstance(module, (BatchRenorm, PowerNorm)):
            module.passes_per_step = parts
        if isinstance(module, BatchNorm):
            module.lanes = lanes
            module.sum_over_ranks = worker.all_reduce_sum if worker.world_size > 1 else None


def layers(model: nn.Module) -> dict[str, RunningNorm]:
    """The norm layers of a model that gather running statistics, by the name of the module; not those of frozen parts,
    whose statistics stay."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, RunningNorm) and not isinstance(module, Frozen)
    }


def join(model: nn.Module, ranks: Sequence[Mapping[str, torch.Tensor]], rows: Sequence[int]) -> dict[str, torch.Tensor]:
    """The running statistics of all ranks' rows together, by the name of the buffer.

    Each layer joins those that it has (`RunningNorm.join`): for batch norm by the law of total variance, in which the
    variance over all ranks is the mean of theirs plus the variance of their means. Computed in float64.

    Parameters
    ----------
    ranks : the buffers of each rank, by name
    rows : how many each rank's statistics are of; only their shares count
    """
    shares = torch.tensor(rows, dtype=torch.float64).view(-1, 1) / sum(rows)
    joint = {}
    for prefix, layer in layers(model).items():
        full_names = {name: f"{prefix}.{name}" if prefix else name for name in layer.running()}
        stacked = {
            name: torch.stack([rank[full_name].double().cpu() for rank in ranks])
            for name, full_name in full_names.items()
        }
        for name, value in layer.join(stacked, shares).items():
            joint[full_names[name]] = value.to(layer.running()[name].dtype)
    return joint


def of_all_ranks(worker: Worker, model: nn.Module, rows: int) -> None:
    """Give the model on every rank the running statistics of all ranks' rows together.

    Parameters
    ----------
    rows : of this rank in each step
    """
    running = _running(model)
    if worker.world_size == 1 or not running:
        return
    sizes = [value.numel() for value in running.values()]
    values = torch.cat([value.double() for value in running.values()] + [torch.tensor([rows], device=worker.device)])
    by_rank = torch.zeros(worker.world_size, len(values), dtype=torch.float64, device=worker.device)
    by_rank[worker.rank] = values
    worker.all_reduce_sum(by_rank)
    ranks = [dict(zip(running, row[:-1].split(sizes), strict=True)) for row in by_rank]
    load(model, join(model, ranks, [int(row[-1]) for row in by_rank]))


@torch.no_grad()
def precise(worker: Worker, model: nn.Module, batches: Iterable[torch.Tensor]) -> None:
    """Replace running statistics by the mean and variance of a norm's input over all batches and ranks, with frozen
    weights (Wu & Johnson 2021, section 3: "PreciseBN").

    Norm layers normalize each batch as in training; everything else is in evaluation mode, and so are norm layers that
    were before: their statistics stay. Moments are summed in float64; the variance is the unbiased one over all rows.

    Parameters
    ----------
    batches : this rank's images, as the model takes them; as many on every rank. A model without running statistics
        reads none.
    """
    norms = {name: norm for name, norm in layers(model).items() if norm.training}
    if not norms:
        return
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    zeros = partial(torch.zeros, dtype=torch.float64, device=worker.device)
    sums = {name: zeros(2 * norm.channels + 1) for name, norm in norms.items()}
    hooks = [before_forward(norm, _summing(sums, name)) for name, norm in norms.items()]
    try:
        with evaluating(model):
            for norm in norms.values():
                norm.train()
            for images in batches:
                model.forward(images)  # not the compiled call: it may know other modes and shapes
    finally:
        for hook in hooks:
            hook.remove()
        load(model, buffers)
    flat = worker.all_reduce_sum(torch.cat(list(sums.values())))
    parts = flat.split([len(value) for value in sums.values()])
    for norm, part in zip(norms.values(), parts, strict=True):
        first, second, count = part.split([norm.channels, norm.channels, 1])
        mean = first / count
        norm.set_population(mean, (second / count - mean**2).clamp(min=0) * (count / (count - 1).clamp(min=1)))


def _summing(sums: dict[str, torch.Tensor], name: str):
    """A function that adds the count, sum and sum of squares of a layer's input to ``sums[name]``."""

    def add(_: nn.Module, x: torch.Tensor) -> None:
        variance, mean = torch.var_mean(
            x.float() if x.dtype != torch.float64 else x, [0, *range(2, x.ndim)], correction=0
        )
        count = x.numel() // x.shape[1]
        mean, variance = mean.double(), variance.double()
        moments = torch.cat([mean * count, (variance + mean**2) * count, mean.new_full((1,), count)])
        sums[name] += moments

    return add


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Leave all buffers as they were before the block."""
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        load(model, before)


@torch.no_grad()
def load(model: nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    """Copy values into the buffers of these names."""
    targets = dict(model.named_buffers())
    for name, value in buffers.items():
        targets[name].copy_(value)


def _running(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}.{name}" if prefix else name: value
        for prefix, layer in layers(model).items()
        for name, value in layer.running().items()
    }
