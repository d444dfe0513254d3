"""Folding of norm layers into the convolution or linear layer before them, for inference."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import fx, nn

from models.entrance import CentreCrop
from models.norms.base import NormLayer, RunningNorm
from models.norms.weight_standardization import StandardizedConv2d, StandardizedLinear, standardized

# The layers that a norm can be folded into -> the weights that they compute with, from their parameter.
_EFFECTIVE_WEIGHT: dict[type[nn.Module], Callable[[torch.Tensor], torch.Tensor]] = {
    nn.Conv2d: lambda weight: weight,
    nn.Linear: lambda weight: weight,
    StandardizedConv2d: standardized,
    StandardizedLinear: standardized,
}
# No network of this package has them, but a network from elsewhere may.
_TORCH_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_SUMS = (operator.add, operator.iadd, torch.add)
_LISTED = 24  # layers that a message names for one reason; `Folded.left` has all


class FoldError(ValueError):
    """Some norm layers cannot be folded; the message says which and why."""


@dataclass(frozen=True)
class Folded:
    """A network with norm layers folded.

    Attributes
    ----------
    model : Module
        The network in evaluation mode; its parameters do not require gradients.
    folded : tuple of str
        The names of the norm layers that it no longer has.
    left : dict of str to str
        The names of the norm layers that it still has, with the reason for each.
    """

    model: nn.Module
    folded: tuple[str, ...]
    left: dict[str, str]


def fold(model: nn.Module, *, partial: bool = False) -> Folded:
    """Return a copy of the model in evaluation mode, without norm layers.

    In evaluation a norm with running statistics is ``factor * x + addend`` for each channel (Ioffe & Szegedy 2015,
    algorithm 2, line 11). With a layer of weight W and bias b before it, both together are that layer with other
    numbers, W' and b' (Jacob et al. 2018, equation 14, for batch norm)::

        W' = factor * W,  b' = factor * b + addend,  factor = scale / sqrt(var + eps),  addend = shift - mean * factor

    Both are computed in float64 and rounded once, to the dtype of the layer's weight. W is the standardized weight
    where the layer standardizes. A linear layer before a norm is taken to return vectors of shape (N, C). A ReLU works
    in place where nothing else takes its input: this changes no number, and saves the memory traffic that is left to
    save.

    Parameters
    ----------
    model : Module
        Any network; it stays as it is.
    partial : bool
        Whether to fold the norms that can be folded and to leave the others, instead of raising.

    Raises
    ------
    FoldError
        A norm is not one of `models.norms`, has no running statistics, or does not follow a convolution or linear layer
        that serves it alone. The message lists all such norms with their reasons.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    names = {module: name for name, module in folded.named_modules() if isinstance(module, (NormLayer, *_TORCH_NORMS))}
    graph = _Graph(folded) if names else None
    replacements: dict[nn.Module, nn.Module] = {}
    left = {}
    for norm, name in names.items():
        try:
            affine = _evaluation_affine(norm)
            layer = graph.layer_before(norm)  # type: ignore[union-attr]
        except FoldError as reason:
            left[name] = str(reason)
        else:
            replacements |= {layer: _scaled(layer, *affine), norm: nn.Identity()}
    if left and not partial:
        raise FoldError(f"{len(left)} of {len(names)} norm layers cannot be folded: {by_reason(left)}")
    replace_modules(folded, replacements)
    if graph:
        for relu in graph.relus_with_exclusive_inputs(replacements.keys()):
            relu.inplace = True
    return Folded(folded, tuple(name for name in names.values() if name not in left), left)


def by_reason(left: dict[str, str]) -> str:
    """Return the reasons of `Folded.left` with their layers, for people: ``reason (layer, layer); reason (layer)``."""
    layers = defaultdict(list)
    for name, reason in left.items():
        layers[reason].append(name)
    more = {reason: f" and {len(names) - _LISTED} more" for reason, names in layers.items() if len(names) > _LISTED}
    return "; ".join(
        f"{reason} ({', '.join(names[:_LISTED])}{more.get(reason, '')})" for reason, names in layers.items()
    )


def _evaluation_affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return factor and addend of a norm in evaluation, of shape (C,) and dtype float64 each."""
    if not isinstance(norm, NormLayer):
        raise FoldError(f"{type(norm).__name__} is torch's own: only norm layers of models.norms are folded")
    if not isinstance(norm, RunningNorm):
        raise FoldError(f"{type(norm).__name__} has no running statistics")
    try:
        return copy.deepcopy(norm).double().evaluation_affine()
    except ValueError as error:
        raise FoldError(str(error)) from None


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # The base class traces into every class that is not torch's.
        is_layer = isinstance(m, (NormLayer, nn.Conv2d, nn.Linear, CentreCrop))
        return is_layer or super().is_leaf_module(m, module_qualified_name)


class _Graph:
    """The calls of a model's modules, and which module takes the output of which."""

    def __init__(self, model: nn.Module):
        self._modules = dict(model.named_modules())
        self._calls: dict[nn.Module, list[fx.Node]] = defaultdict(list)
        self._failure = ""
        try:
            nodes = list(_Tracer().trace(model).nodes)
        except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:  # as the model's code may
            self._failure = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        else:
            for node in nodes:
                if node.op == "call_module":
                    self._calls[self._modules[str(node.target)]].append(node)

    def layer_before(self, norm: nn.Module) -> nn.Module:
        """Return the layer whose output goes into this norm and nowhere else.

        Raises
        ------
        FoldError
            There is no such layer, or it cannot take up the norm.
        """
        if self._failure:
            raise FoldError(f"the network's graph cannot be traced: {self._failure}")
        calls = self._calls[norm]
        if len(calls) != 1:
            raise FoldError(f"it is called {len(calls)} times")
        source = calls[0].all_input_nodes[0]
        layer = self._modules.get(str(source.target)) if source.op == "call_module" else None
        if layer is None or type(layer) not in _EFFECTIVE_WEIGHT:
            raise FoldError(f"it follows {self._describe(source)}, not a 2d convolution or linear layer")
        if len(source.users) > 1 or len(self._calls[layer]) > 1:
            raise FoldError(f"what {source.target} gives is used elsewhere, too")
        if len(layer.weight) != norm.channels:
            raise FoldError(f"{source.target} has {len(layer.weight)} outputs, and the norm {norm.channels} channels")
        return layer

    def relus_with_exclusive_inputs(self, replaced: Container[nn.Module]) -> Iterator[nn.ReLU]:
        """Yield the ReLUs whose input is a new tensor, from a layer, a folded norm, or `torch.add`, that nothing else
        takes."""
        for module, calls in self._calls.items():
            if type(module) is not nn.ReLU or len(calls) != 1:
                continue
            source = calls[0].all_input_nodes[0]
            producer = self._modules.get(str(source.target)) if source.op == "call_module" else None
            # The trace shows += as +, and the tensor that it returns may have another name.
            is_new = type(producer) in _EFFECTIVE_WEIGHT or producer in replaced or source.target is torch.add
            if is_new and len(source.users) == 1:
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
    """Return a plain layer that computes ``factor * layer(x) + addend``, its weights in the layer's dtype and memory
    layout."""
    assert isinstance(layer, (nn.Conv2d, nn.Linear))
    weight = _EFFECTIVE_WEIGHT[type(layer)](layer.weight.double())
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


def replace_modules(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> None:
    """Put modules in the place of others, under every name by which the model has them."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements:
                setattr(parent, name, replacements[child])
