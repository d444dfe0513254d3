"""The convolutions and linear layers before normalizations: which they are, and how they take up what a norm did."""

from __future__ import annotations

from typing import cast

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from models.dataflow import DataFlow, Shapes, layers_with
from models.norms.weight_standardization import STANDARDIZED

Layer = _ConvNd | nn.Linear
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_PLAIN = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


class LayersBefore:
    """The layers before the norms of a network.

    Parameters
    ----------
    network : Module
    flow : DataFlow
        Its data flow.
    shapes : dict of str to set of tuple of int
        The shapes of what reaches the norms, as far as they are known.
    """

    def __init__(self, network: nn.Module, flow: DataFlow, shapes: Shapes):
        self._network, self._flow, self._shapes = network, flow, shapes

    def exclusive(self, norm: str, channels: int) -> tuple[str, Layer]:
        """Return name and layer of the one whose outputs are this norm's inputs, all of them and nothing else's.

        A linear layer is taken to return vectors of shape (N, C) where shapes are not known.

        Raises
        ------
        LookupError
            There is none, or its weights cannot be changed; the message says why.
        """
        sources = self._flow.sources(norm)
        if len(sources) > 1:
            raise LookupError(f"it follows several layers, {', '.join(sorted(sources))}")
        (name,) = sources
        layer = self._network.get_submodule(name)
        if type(layer) not in _PLAIN or layer._parameters.get("weight") is None:
            raise LookupError(f"it follows {name} ({type(layer).__name__}), no plain convolution or linear layer")
        layer = cast(Layer, layer)
        if self._flow.consumers(name) != {norm}:
            raise LookupError(f"what {name} gives is used elsewhere, too")
        if self._flow.uses_parameters_of(name) or len(list(layers_with(self._network, layer.weight))) > 1:
            raise LookupError(f"the weights of {name} are used elsewhere, too")
        if layer._forward_hooks:
            raise LookupError(f"{name} has hooks, which may change what it gives")
        is_vector = all(len(shape) == 2 for shape in self._shapes.get(norm, ()))
        outputs = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if outputs != channels or (isinstance(layer, nn.Linear) and not is_vector):
            raise LookupError(f"the outputs of {name} are not its channels")
        return name, layer

    def standardize(self, norm: str, replaced: set[str]) -> tuple[list[str], list[str]]:
        """Let the layers before a norm compute with standardized weights; parameters and hooks stay the same objects.

        Parameters
        ----------
        norm : str
        replaced : set of str
            The norms before which layers are standardized: nothing else may take their outputs.

        Returns
        -------
        The names of the layers that are standardized, and a reason for each of the other sources.

        Raises
        ------
        LookupError
            The sources are not known, or no layers.
        """
        done, reasons = [], []
        for name in sorted(self._flow.sources(norm)):
            layer = self._network.get_submodule(name)
            if type(layer) in STANDARDIZED.values():
                done.append(name)
            elif type(layer) not in STANDARDIZED or layer._parameters.get("weight") is None:
                reasons.append(f"{name} ({type(layer).__name__}) has no standardized kind")
            elif not self._flow.consumers(name) <= replaced:
                reasons.append(f"what {name} gives is used elsewhere, too")
            else:
                layer.__class__ = STANDARDIZED[type(layer)]
                done.append(name)
        return done, reasons

    def may_have_one_position(self, norm: str) -> bool:
        """Whether each channel of a sample has, or may have, a single value where it reaches this norm.

        Where shapes are not known, this is so for vectors, for what reaches a 1d norm and is not a convolution's, and
        for maps that were pooled to 1 x 1, also behind 1x1 convolutions, activations and the like.
        """
        if norm in self._shapes:
            return any(torch.Size(shape[2:]).numel() <= 1 for shape in self._shapes[norm])
        name, seen = norm, {norm}
        while True:
            try:
                sources = self._flow.sources(name) - seen
            except LookupError:
                sources = set()
            if not sources:
                return isinstance(self._network.get_submodule(norm), nn.BatchNorm1d)
            name = min(sources)
            seen.add(name)
            layer = self._network.get_submodule(name)
            if isinstance(layer, (nn.Linear, nn.Flatten)):
                return True
            if hasattr(layer, "output_size"):  # adaptive pooling
                return layer.output_size in (1, (1,), (1, 1), (1, 1, 1))
            is_wide = isinstance(layer, _ConvNd) and set(layer.kernel_size) != {1}
            if is_wide or isinstance(layer, (nn.Unflatten, nn.Upsample)):
                return False


@torch.no_grad()
def take_up(layer: Layer, factor: torch.Tensor, addend: torch.Tensor, *, trained: bool) -> None:
    """Let a layer compute ``factor * layer(x) + addend``, both of shape (outputs,), in float64 rounded once.

    Parameters
    ----------
    trained : bool
        Whether a bias that the layer did not have requires gradients.
    """
    weight = layer.weight
    if isinstance(layer, _TRANSPOSED):  # (inputs, outputs / groups, ...), the groups one after the other
        scaled = weight.double().unflatten(0, (layer.groups, -1))
        scaled = scaled * factor.view(layer.groups, 1, -1, *(1,) * (weight.ndim - 2))
        weight.copy_(scaled.flatten(0, 1))
    else:
        weight.copy_(weight.double() * factor.view(-1, *(1,) * (weight.ndim - 1)))
    if layer.bias is not None:
        addend = factor * layer.bias.double() + addend
    set_bias(layer, addend, trained=trained)


@torch.no_grad()
def set_bias(layer: Layer, bias: torch.Tensor, *, trained: bool) -> None:
    """Give a layer a bias in the dtype of its weight; one that it has gets other values."""
    if layer.bias is None:
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), requires_grad=trained)
    else:
        layer.bias.copy_(bias)
