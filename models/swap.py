"""Normalization layers by name in the place of a network's own.

>>> from pipeline.config.training import ModelSettings
>>> swapped = with_norm(network, ModelSettings(norm="group"))
>>> swapped.network, swapped.replaced, swapped.kept
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch import nn

from models.dataflow import DataFlow, layers_with
from models.norm_state import NormState, carry, carry_hooks, state_of
from models.norms.affine import ChannelAffine
from models.norms.base import NormLayer, RunningNorm
from models.norms.batch import BatchNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.instance import InstanceNorm
from models.norms.registry import make_norm
from models.norms.weight_standardization import STANDARDIZED
from pipeline.config.training import ModelSettings

BATCH_NORMS: tuple[type[nn.Module], ...] = (
    nn.BatchNorm1d,
    nn.BatchNorm2d,
    nn.BatchNorm3d,
    nn.SyncBatchNorm,
    BatchNorm,
)
_NORMS = (NormLayer, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
# A constant that is added to a channel before such a norm changes nothing after it.
_CENTERING = (BatchNorm, BatchRenorm, InstanceNorm)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LINEAR_IN_X = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)


class Swapped(NamedTuple):
    """A network with other normalization layers.

    Attributes
    ----------
    network : Module
        A copy of the one that was given.
    replaced : tuple of str
        The names of the layers that were replaced.
    kept : dict of str to str
        The names of the normalizations that are as they were, with the reason for each. A call of batch norm as a
        function is named by the module that makes it, ``"block.batch_norm"``.
    notes : dict of str to str
        What else has changed, or could not be carried over, by the name of the layer.
    """

    network: nn.Module
    replaced: tuple[str, ...]
    kept: dict[str, str]
    notes: dict[str, str]


def with_norm(
    network: nn.Module,
    settings: ModelSettings,
    *,
    replace: tuple[type[nn.Module], ...] = BATCH_NORMS,
    inputs: torch.Tensor | None = None,
) -> Swapped:
    """Return a copy of a network in which the normalization of the settings is in the place of batch norm.

    Parameters
    ----------
    network : Module
        Any network; it stays as it is.
    settings : ModelSettings
        ``norm`` and what belongs to it. A layer's own eps and momentum stay where the settings have their defaults.
    replace : tuple of types
        The layers to replace: by default the batch norm layers of torch and of this package.
    inputs : Tensor, optional
        A batch that the network takes. With it, the shapes that reach each layer are known and not guessed.

    Raises
    ------
    ValueError
        No norm has this name.
    """
    swap = _Swap(copy.deepcopy(network), settings, replace)
    swap.make_layers()
    swap.connect()
    return swap.result()


class _Swap:
    def __init__(self, network: nn.Module, settings: ModelSettings, replace: tuple[type[nn.Module], ...]):
        self._network, self._settings, self._replace = network, settings, replace
        self._norm = make_norm(settings)
        self._flow = DataFlow(network, (*replace, *_NORMS))
        self._states: dict[str, NormState] = {}
        self._new: dict[str, nn.Module] = {}
        self._kept: dict[str, str] = {}
        self._notes: dict[str, str] = {}

    def make_layers(self) -> None:
        """Make the new layers, or say why the old ones are kept."""
        for name, old in self._network.named_modules():
            if not isinstance(old, (*self._replace, *_NORMS)) and "running_mean" not in old._buffers:
                continue
            try:
                self._check(name, old)
                state = self._states[name] = state_of(old)
                self._new[name] = self._layer(old, state)
            except ValueError as reason:
                self._kept[name] = str(reason).partition(";")[0]
        self._kept |= dict.fromkeys(self._flow.functional, "it is a call of a function, not a layer")

    def _check(self, name: str, old: nn.Module) -> None:
        kind = type(old)
        family = next((one for one in self._replace if isinstance(old, one)), None)
        if family is None:
            raise ValueError(f"{kind.__name__} is not one of the layers to replace")
        if kind not in self._replace and kind.forward is not family.forward:
            raise ValueError(f"{kind.__name__} is a {family.__name__} with a forward pass of its own")
        if self._flow.uses_parameters_of(name):
            raise ValueError("its parameters or statistics are used outside of it, too")

    def _layer(self, old: nn.Module, state: NormState) -> nn.Module:
        """Return a new layer with what the old one has learned; `none` is done in `connect`."""
        changes: dict[str, object] = {}
        if state.scale is None:
            changes["scale"] = "off"
        if state.shift is None:
            changes["shift"] = "off"
        if state.eps is not None and self._is_default("norm_eps"):
            changes["eps"] = state.eps
        if state.momentum is not None and self._norm.keeps_statistics and self._is_default("norm_momentum"):
            changes["momentum"] = state.momentum
        layer = self._norm.layer(state.channels, **changes)
        like = state.like()
        if like is None:
            like = next((p for p in self._network.parameters() if p.is_floating_point()), torch.empty(0))
        layer.to(device=like.device, dtype=like.dtype)
        if isinstance(layer, NormLayer):
            carry(state, layer)
        carry_hooks(old, layer)
        return layer.train(old.training)

    def _is_default(self, name: str) -> bool:
        return getattr(self._settings, name) == ModelSettings.model_fields[name].default

    def connect(self) -> None:
        """Change the layers before the new ones."""
        for name in list(self._new):
            if isinstance(self._new[name], nn.Identity):
                self._take_away(name)
            elif isinstance(self._new[name], _CENTERING):
                self._drop_bias(name)

    @torch.no_grad()
    def _take_away(self, name: str) -> None:
        """Let the layer before a norm compute what both did in evaluation; where there is none, leave a factor and an
        addend for each channel in the norm's place."""
        state = self._states[name]
        factor, addend = state.affine()
        try:
            before = self._layer_before(name)
        except LookupError as reason:
            self._notes[name] = f"a scale and a shift of each channel stay: {reason.args[0]}"
            self._new[name] = self._affine(name, state)
            return
        layer = self._network.get_submodule(before)
        _scale_outputs(layer, factor)
        if layer.bias is None:
            trained = state.shift.requires_grad if state.shift is not None else layer.weight.requires_grad
            bias = addend.to(layer.weight.dtype)
            layer.register_parameter("bias", nn.Parameter(bias, requires_grad=trained))
        else:
            layer.bias.copy_(factor * layer.bias.double() + addend)
        self._notes[before] = f"it computes what it and {name} did in evaluation"

    def _affine(self, name: str, state: NormState) -> nn.Module:
        factor, addend = state.affine()
        layer = ChannelAffine(
            state.channels,
            scale="fixed" if state.scale is None else "learned",
            shift="fixed" if state.shift is None else "learned",
        )
        old = self._new[name]
        like = state.like()
        if like is not None:
            layer.to(device=like.device, dtype=like.dtype)
        carry(NormState(state.channels, None, None, factor, addend, None, None), layer)
        carry_hooks(old, layer)
        return layer.train(old.training)

    @torch.no_grad()
    def _drop_bias(self, name: str) -> None:
        """Take the bias from the layer before a norm that subtracts it again, and from the running mean, too."""
        try:
            layer = self._network.get_submodule(before := self._layer_before(name))
        except LookupError:
            return
        norm = self._new[name]
        if layer.bias is None or (isinstance(norm, RunningNorm) and self._states[name].mean is None):
            return
        if isinstance(norm, RunningNorm):
            norm.running_mean.sub_(layer.bias)  # type: ignore[union-attr, operator]
        layer.bias = None
        self._notes[before] = f"its bias is gone: {name} subtracts each channel's mean"

    def _layer_before(self, name: str) -> str:
        """Return the convolution or linear layer whose outputs go into a norm and nowhere else.

        Raises
        ------
        LookupError
            There is none, with the reason.
        """
        sources = self._flow.sources(name)
        if len(sources) > 1:
            raise LookupError(f"it follows several layers: {', '.join(sorted(sources))}")
        (before,) = sources
        layer = self._network.get_submodule(before)
        if type(layer) not in _LINEAR_IN_X or layer._parameters.get("weight") is None:
            raise LookupError(f"it follows {before} ({type(layer).__name__}), no plain convolution or linear layer")
        if self._flow.consumers(before) != {name}:
            raise LookupError(f"what {before} gives is used elsewhere, too")
        if self._flow.uses_parameters_of(before) or len(list(layers_with(self._network, layer.weight))) > 1:
            raise LookupError(f"the weights of {before} are used elsewhere, too")
        if layer._forward_hooks:
            raise LookupError(f"{before} has hooks, which may change what it gives")
        return before

    def result(self) -> Swapped:
        modules = dict(self._network.named_modules())
        replacements = {modules[name]: layer for name, layer in self._new.items()}
        for parent in list(self._network.modules()):
            for name, child in list(parent._modules.items()):
                if child in replacements:
                    parent._modules[name] = replacements[child]
        network = replacements.get(self._network, self._network)
        return Swapped(network, tuple(self._new), self._kept, self._notes)


def _scale_outputs(layer: nn.Module, factor: torch.Tensor) -> None:
    """Multiply the weights of each output of a layer, in place, with float64 in between."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    if isinstance(layer, _TRANSPOSED):
        scaled = weight.double().unflatten(0, (layer.groups, -1))
        scaled = scaled * factor.view(layer.groups, 1, -1, *(1,) * (weight.ndim - 2))
        weight.copy_(scaled.flatten(0, 1))
    else:
        weight.copy_(weight.double() * factor.view(-1, *(1,) * (weight.ndim - 1)))
