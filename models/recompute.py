"""Gradient checkpointing (Chen et al. 2016): blocks of a network keep their inputs alone, and are computed again in the
backward pass, so that most activations are never in memory all at once."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.norms.base import NormLayer

_THREAD = threading.local()  # backward passes of a GPU are made by a thread of their own


class Block(NamedTuple):
    """What is computed again as a whole: a module, or consecutive layers of a `torch.nn.Sequential`.

    Attributes
    ----------
    name : str
        That of the module, or of the first and the last layer: ``"features.0-3"``.
    layers : tuple of Module
        One module, or the layers.
    chain : Sequential or None
        What the layers are children of; None where the block is one module.
    """

    name: str
    layers: tuple[nn.Module, ...]
    chain: nn.Sequential | None


def blocks_of(network: nn.Module) -> list[Block]:
    """Return the blocks that `recompute_in_backward` computes again, in the order of their names in the network.

    A child of a `torch.nn.Sequential` or `ModuleList` that has children itself is a block: a residual block, for
    instance. In a `Sequential` of nothing but layers, each layer with a matrix of weights (a convolution, say) begins a
    block, which ends before the next one. Blocks within blocks, and layers elsewhere, are none.
    """
    return list(_blocks(network, ""))


def recompute_in_backward(network: nn.Module) -> list[str]:
    """Let the blocks of a network keep their inputs alone in training, and return their names.

    The names of parameters and buffers stay. What a block computes the second time is the same, bit for bit: it sees
    the buffers that it saw the first time, such as running statistics before their update, and draws the same random
    numbers. Buffers are afterwards what the first time made of them, so that nothing is counted twice. Collectives
    within a block are made again, in the same order on every rank.

    Parameters
    ----------
    network : Module
        It is changed in place: the blocks' ``forward`` is replaced.

    Raises
    ------
    ValueError
        There is no block.
    """
    blocks = blocks_of(network)
    if not blocks:
        raise ValueError(
            "train.gradient_checkpointing finds no blocks in this network, which are children of nn.Sequential or "
            "nn.ModuleList: put what may be computed again into such, or set it to false"
        )
    chains: dict[nn.Sequential, list[Callable[..., Any]]] = {}
    for block in blocks:
        if block.chain is None:
            (module,) = block.layers
            module.forward = _twice(module.forward, block.layers)
        else:
            chains.setdefault(block.chain, []).append(_twice(_one_after_the_other(block.layers), block.layers))
    for chain, parts in chains.items():
        chain.forward = _one_after_the_other(parts)  # type: ignore[method-assign]
    return [block.name for block in blocks]


def is_recomputing() -> bool:
    """Return whether a block is being computed again, by the thread that asks: hooks would see its values twice."""
    return getattr(_THREAD, "recomputing", False)


def _blocks(module: nn.Module, prefix: str) -> Iterator[Block]:
    if _is_plain_chain(module):
        yield from _of_chain(module, prefix)  # type: ignore[arg-type]
        return
    contains = _is_container(module)
    for name, child in module.named_children():
        full_name = f"{prefix}{name}"
        if contains and not _is_layer(child) and not _is_container(child):
            yield Block(full_name, (child,), None)
        else:
            yield from _blocks(child, f"{full_name}.")


def _of_chain(chain: nn.Sequential, prefix: str) -> Iterator[Block]:
    parts: list[list[tuple[str, nn.Module]]] = [[]]
    for name, layer in chain.named_children():
        begins = _has_matrix(layer)
        if begins and any(_has_matrix(before) for _, before in parts[-1]):
            parts.append([])
        parts[-1].append((name, layer))
    if any(_has_matrix(layer) for layer in chain):
        for part in parts:
            names = [name for name, _ in part]
            yield Block(f"{prefix}{names[0]}-{names[-1]}", tuple(layer for _, layer in part), chain)


def _is_container(module: nn.Module) -> bool:
    """Whether a module is nothing but its children, one after the other or called by their parent."""
    return type(module).forward is nn.Sequential.forward or isinstance(module, nn.ModuleList)


def _is_plain_chain(module: nn.Module) -> bool:
    return type(module).forward is nn.Sequential.forward and all(_is_layer(child) for child in module.children())


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, NormLayer) or not any(True for _ in module.children())


def _has_matrix(layer: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in layer.parameters())


def _one_after_the_other(parts: Any) -> Callable[..., Any]:
    def forward(values: Any) -> Any:
        for part in parts:
            values = part(values)
        return values

    return forward


def _twice(forward: Callable[..., Any], layers: tuple[nn.Module, ...]) -> Callable[..., Any]:
    """``forward``, which in training is called again in the backward pass."""

    def first_time(*args: Any, **options: Any) -> Any:
        if not (torch.is_grad_enabled() and any(layer.training for layer in layers)):
            return forward(*args, **options)
        buffers = [buffer for layer in layers for buffer in layer.buffers()]
        before = [buffer.clone() for buffer in buffers]
        return checkpoint(
            forward,
            *args,
            use_reentrant=False,
            context_fn=lambda: (contextlib.nullcontext(), _second_time(buffers, before)),
            **options,
        )

    return first_time


@contextlib.contextmanager
def _second_time(buffers: list[torch.Tensor], before: list[torch.Tensor]) -> Iterator[None]:
    """Buffers have the values from before the first time within the block, and afterwards those from before it.

    The tensors stay the same: a norm's backward pass may write into one. Autograd is not told that they change, since
    it saves none of them for its formulas: a norm that used one there could not update it in training either.
    """
    now = [buffer.clone() for buffer in buffers]
    _copy(buffers, before)
    _THREAD.recomputing = True
    try:
        yield
    finally:
        _THREAD.recomputing = False
        _copy(buffers, now)


def _copy(buffers: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.data.copy_(value)
