"""Norm layers folded into the convolution or linear layer before them, for inference."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from models.norms.base import NormLayer, RunningNorm
from models.norms.weight_standardization import StandardizedConv2d, StandardizedLinear, standardized

# Layers that can take up a norm, and the weights that they compute with.
_WEIGHTS: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    nn.Conv2d: lambda weight: weight,
    nn.Linear: lambda weight: weight,
    StandardizedConv2d: standardized,
    StandardizedLinear: standardized,
}
# Norms of torch's own: no network here has them, but one that somebody else gives may.
_OF_TORCH = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_SUMS = (operator.add, operator.iadd, torch.add)
_SHOWN = 24  # layers that a message names for one reason; `Folded.left` has all


class FoldError(ValueError):
    """Norm layers cannot be folded: which, and why."""


@dataclass(frozen=True)
class Folded:
    """model : for evaluation; its parameters do not require gradients
    folded : names of the norm layers that it no longer has
    left : names of the norm layers that it still has -> why
    """

    model: nn.Module
    folded: tuple[str, ...]
    left: dict[str, str]


def fold(model: nn.Module, *, partial: bool = False) -> Folded:
    """A copy of the model in evaluation mode, without norm layers.

    In evaluation a norm with running statistics is ``factor * x + addend`` for each channel (Ioffe & Szegedy 2015,
    algorithm 2, line 11). After a layer with weight W and bias b that is the same layer with other numbers, W' and b'
    (Jacob et al. 2018, equation 14, for batch norm)::

        W' = factor * W,  b' = factor * b + addend,  factor = scale / sqrt(var + eps),  addend = shift - mean * factor

    Both are computed in float64 and rounded once. W is the standardized weight where the layer standardizes. Linear
    layers are taken to give vectors (N, C). A ReLU works in place where nothing else takes its input: this changes no
    number, and saves the memory traffic that is left to save.

    Parameters
    ----------
    partial : fold the norms that can be folded and leave the others, instead of raising

    Raises
    ------
    FoldError
        A norm is not one of ours, has no running statistics, or does not follow a convolution or linear layer of its
        own. All such norms are listed with their reasons.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    names = {module: name for name, module in folded.named_modules() if isinstance(module, (NormLayer, *_OF_TORCH))}
    graph = _Graph(folded) if names else None
    replacements: dict[nn.Module, nn.Module] = {}
    left = {}
    for norm, name in names.items():
        try:
            evaluated = _at_evaluation(norm)
            layer = graph.layer_before(norm)  # type: ignore[union-attr]
        except FoldError as reason:
            left[name] = str(reason)
        else:
            replacements |= {layer: _scaled(layer, *evaluated), norm: nn.Identity()}
    if left and not partial:
        raise FoldError(f"{len(left)} of {len(names)} norm layers cannot be folded: {by_reason(left)}")
    _replace(folded, replacements)
    if graph:
        for relu in graph.relus_of_their_own(replacements.keys()):
            relu.inplace = True
    return Folded(folded, tuple(name for name in names.values() if name not in left), left)


def by_reason(left: dict[str, str]) -> str:
    """``reason (layer, layer); reason (layer)``, for people."""
    layers = defaultdict(list)
    for name, reason in left.items():
        layers[reason].append(name)
    more = {reason: f" and {len(names) - _SHOWN} more" for reason, names in layers.items() if len(names) > _SHOWN}
    return "; ".join(
        f"{reason} ({', '.join(names[:_SHOWN])}{more.get(reason, '')})" for reason, names in layers.items()
    )


def _at_evaluation(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """(factor, addend) of a norm, (C,) each, in float64."""
    if not isinstance(norm, NormLayer):
        raise FoldError(f"{type(norm).__name__} is torch's own: only norm layers of models.norms are folded")
    if not isinstance(norm, RunningNorm):
        raise FoldError(f"{type(norm).__name__} has no running statistics")
    try:
        return copy.deepcopy(norm).double().at_evaluation()
    except ValueError as error:
        raise FoldError(str(error)) from None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # By itself it looks into every class that is not torch's own.
        known = isinstance(m, (NormLayer, nn.Conv2d, nn.Linear))
        return known or super().is_leaf_module(m, module_qualified_name)


class _Graph:
    """Which module of a model takes what another gives."""

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules())
        self._calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self._failure = ""
        try:
            nodes = list(_Tracer().trace(model).nodes)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:  # what the model's code may
            self._failure = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        else:
            for node in nodes:
                if node.op == "call_module":
                    self._calls[self._modules[str(node.target)]].append(node)

    def layer_before(self, norm: nn.Module) -> nn.Module:
        """The layer whose output goes into this norm and nowhere else."""
        if self._failure:
            raise FoldError(f"the network's graph cannot be traced: {self._failure}")
        calls = self._calls[norm]
        if len(calls) != 1:
            raise FoldError(f"it is called {len(calls)} times")
        source = calls[0].all_input_nodes[0]
        layer = self._modules.get(str(source.target)) if source.op == "call_module" else None
        if layer is None or type(layer) not in _WEIGHTS:
            raise FoldError(f"it follows {self._describe(source)}, not a convolution or linear layer")
        if len(source.users) > 1 or len(self._calls[layer]) > 1:
            raise FoldError(f"what {source.target} gives is used elsewhere, too")
        if len(layer.weight) != norm.channels:
            raise FoldError(f"{source.target} has {len(layer.weight)} outputs, and the norm {norm.channels} channels")
        return layer

    def relus_of_their_own(self, replaced: Container[nn.Module]) -> Iterator[nn.ReLU]:
        """Those whose input is a new tensor that they alone take: of a layer, a folded norm, or `torch.add`."""
        for module, calls in self._calls.items():
            if type(module) is not nn.ReLU or len(calls) != 1:
                continue
            source = calls[0].all_input_nodes[0]
            maker = self._modules.get(str(source.target)) if source.op == "call_module" else None
            # The trace shows += as +, and what that gives may have another name.
            new = type(maker) in _WEIGHTS or maker in replaced or source.target is torch.add
            if new and len(source.users) == 1:
                yield module

    def _describe(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return "the network's input"
        if node.op == "call_module":
            return type(self._modules[str(node.target)]).__name__
        if node.op == "call_method":
            return f"{node.target} of {self._describe(node.all_input_nodes[0])}"
        return "a sum" if node.target in _SUMS else getattr(node.target, "__name__", str(node.target))


def _scaled(layer: nn.Module, factor: torch.Tensor, addend: torch.Tensor) -> nn.Module:
    """A plain layer that gives ``factor * layer(x) + addend``, its weights in the layer's dtype and memory layout."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = _WEIGHTS[type(layer)](layer.weight.double())
    weight = weight * factor.view(-1, *(1,) * (weight.ndim - 1))
    bias = addend if layer.bias is None else factor * layer.bias.double() + addend
    plain: nn.Conv2d | nn.Linear
    if isinstance(layer, nn.Linear):
        plain = nn.Linear(layer.in_features, layer.out_features, device="meta")
    else:
        plain = nn.Conv2d(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,  # type: ignore[arg-type]
            stride=layer.stride,  # type: ignore[arg-type]
            padding=layer.padding,  # type: ignore[arg-type]
            dilation=layer.dilation,  # type: ignore[arg-type]
            groups=layer.groups,
            padding_mode=layer.padding_mode,
            device="meta",
        )
    plain.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)
    plain.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=False)
    return plain.eval()


def _replace(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, wherever and under however many names the model has them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
