"""Hooks that see what a layer gets, whether it is called by position or by keyword."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle


def before_forward(layer: nn.Module, watch: Callable[[Any, torch.Tensor], object]) -> RemovableHandle:
    """Let ``watch(layer, x)`` be called before each forward pass of a layer, where x is its first argument."""

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], by_keyword: dict[str, torch.Tensor]) -> None:
        watch(module, inputs[0] if inputs else next(iter(by_keyword.values())))

    return layer.register_forward_pre_hook(hook, with_kwargs=True)
