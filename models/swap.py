"""Normalization layers by name in the place of a network's own.

>>> from pipeline.config.model import ModelSettings
>>> swapped = with_norm(network, ModelSettings(norm="group"))
>>> swapped.network, swapped.replaced, swapped.kept
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace as changed
from typing import NamedTuple

import torch
from torch import nn

from models.dataflow import DataFlow, input_shapes
from models.fold import replace_modules
from models.layers_before import LayersBefore, set_bias, take_up
from models.norm_state import NormState, carry, carry_hooks, carry_training, state_of
from models.norms.affine import ScaleAndShift
from models.norms.base import NormLayer, RunningNorm
from models.norms.batch import BatchNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.group import GroupNorm
from models.norms.instance import InstanceNorm
from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings

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


NOTHING_REPLACED = "the network has no batch norm layer that can be, and computes what it did"


class NothingReplacedWarning(UserWarning):
    """A network was given to `with_norm` that has no layer to replace."""


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
    """Return a copy of a network in which the normalization of the settings has taken the place of batch norm.

    The new layers take over the scale, the shift and the running statistics as far as they have them, eps and momentum
    where the settings leave those at their defaults, and dtype, device, mode, hooks, and whether they are trained. With
    W and b the layer before a norm, whose outputs nothing else takes, and factor and addend what batch norm applied in
    evaluation (`models.fold`):

    - ``none``: W becomes ``factor * W`` and b ``factor * b + addend``, so that in evaluation the network computes what
      it did. Where no such layer is known, the factor and the addend stay as learned numbers of each channel.
    - A norm that subtracts each channel's mean (batch, batch_renorm, instance): b goes, from the running mean, too.
    - Another one with ``norm_shift: off``: b takes up the shift, as ``b + shift * sqrt(var + eps) - mean``. With
      ``norm_shift: fixed`` the shift stays in the norm, and a layer without b gets one of zeros that is trained.
    - ``weight_standardized_group``: the layers before it compute with standardized weights.

    Which layer is before which norm is read from traces of the forward pass (`models.dataflow`), in training and in
    evaluation.

    Parameters
    ----------
    network : Module
        Any network; it stays as it is.
    settings : ModelSettings
        ``norm`` and the settings that begin with ``norm_``, but for ``norm_scale_init``.
    replace : tuple of types
        The layers to replace, with channels at axis 1: the batch norm layers of torch and of this package.
    inputs : Tensor, optional
        A batch that the network takes. With it the shapes that reach each layer are known and not guessed.

    Warns
    -----
    NothingReplacedWarning
        No layer was replaced.

    Raises
    ------
    ValueError
        No norm has this name, the network does not take the inputs, or it cannot be copied.
    """
    check_sizes(network)
    norm_types = (*replace, *_NORMS)
    network = _copy(network)
    shapes = {} if inputs is None else input_shapes(network, norm_types, inputs)
    flow = DataFlow(network, norm_types)
    swap = _Swap(network, settings, replace, flow, LayersBefore(network, flow, shapes))
    swap.make_layers()
    for name in swap.new:
        swap.connect(name)
    if not swap.new:
        warnings.warn(f"with_norm has replaced nothing: {NOTHING_REPLACED}", NothingReplacedWarning, stacklevel=2)
    modules = dict(network.named_modules())
    replacements = {modules[name]: layer for name, layer in swap.new.items()}
    replace_modules(network, replacements)
    return Swapped(replacements.get(network, network), tuple(swap.new), swap.kept, swap.notes)


def _copy(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except (RuntimeError, TypeError) as error:  # tensors of a graph, locks, open files
        raise ValueError(f"the network cannot be copied: {error}") from error


def check_sizes(network: nn.Module) -> None:
    """Check that no lazy layer waits for its first batch.

    Raises
    ------
    ValueError
        One does; the message names it.
    """
    lazy = ((name, one) for name, one in network.named_modules() if isinstance(one, nn.modules.lazy.LazyModuleMixin))
    waiting = [name for name, module in lazy if module.has_uninitialized_params()]  # type: ignore[misc]
    if waiting:
        raise ValueError(f"{', '.join(waiting)} do not know their sizes yet: give the network a batch first")


class _Swap:
    """The new layers by name, the old ones that are kept with reasons, and notes on what else changes."""

    def __init__(
        self,
        network: nn.Module,
        settings: ModelSettings,
        replace: tuple[type[nn.Module], ...],
        flow: DataFlow,
        before: LayersBefore,
    ):
        self._network, self._settings, self._replace = network, settings, replace
        self._flow, self._before = flow, before
        self._norm = make_norm(settings)
        self._states: dict[str, NormState] = {}
        self.new: dict[str, nn.Module] = {}
        self.kept: dict[str, str] = {}
        self.notes: dict[str, str] = {}

    def make_layers(self) -> None:
        """Make the new layers, or say why the old ones are kept. Groups of one channel are instance norm."""
        for name, old in self._network.named_modules():
            is_norm = isinstance(old, (*self._replace, *_NORMS)) or "running_mean" in old._buffers
            if not is_norm or isinstance(old, ScaleAndShift):  # which normalizes nothing
                continue
            try:
                self._check(name, old)
                state = self._states[name] = state_of(old)
                layer = self._layer(old, state)
                if isinstance(layer, GroupNorm) and layer.groups == state.channels:
                    self._check_positions(name)
                self.new[name] = layer
            except ValueError as error:
                self.kept[name] = str(error).partition(";")[0]
        self.kept |= dict.fromkeys(self._flow.functional, "it is a call of a function, not a layer")

    def _check(self, name: str, old: nn.Module) -> None:
        kind = type(old)
        family = next((one for one in self._replace if isinstance(old, one)), None)
        if family is None:
            raise ValueError(f"{kind.__name__} is not one of the layers to replace")
        if kind not in self._replace and kind.forward is not family.forward:
            raise ValueError(f"{kind.__name__} is a {family.__name__} with a forward pass of its own")
        if self._flow.uses_parameters_of(name):
            raise ValueError("its parameters or statistics are used outside of it, too")
        if self._norm.needs_positions:
            self._check_positions(name)

    def _check_positions(self, name: str) -> None:
        if self._before.may_have_one_position(name):
            raise ValueError(f"{self._settings.norm} norm needs several positions of a channel, and may get one here")

    def _layer(self, old: nn.Module, state: NormState) -> nn.Module:
        """Return a new layer with what the old one has learned."""
        changes: dict[str, object] = {}
        if state.scale is None:
            changes["scale"] = "off"
        if state.shift is None:
            changes["shift"] = "off"
        if state.eps is not None and self._is_default("norm_eps"):
            changes["eps"] = state.eps
        if state.momentum is not None and self._norm.keeps_statistics and self._is_default("norm_momentum"):
            changes["momentum"] = state.momentum
        return self._in_place_of(old, self._norm.layer(state.channels, **changes), state)

    def _in_place_of(self, old: nn.Module, layer: nn.Module, state: NormState) -> nn.Module:
        like = state.like()
        if like is None:
            like = next((p for p in self._network.parameters() if p.is_floating_point()), torch.empty(0))
        layer.to(device=like.device, dtype=like.dtype)
        if isinstance(layer, NormLayer):
            carry(state, layer)
            carry_training(state, layer)
        carry_hooks(old, layer)
        return layer.train(old.training)

    def _is_default(self, name: str) -> bool:
        return getattr(self._settings, name) == ModelSettings.model_fields[name].default

    def connect(self, name: str) -> None:
        """Change the layer before a new one, as far as it is known, and note what is lost."""
        layer = self.new[name]
        if isinstance(layer, nn.Identity):
            self._leave_affine(name)
            return
        assert isinstance(layer, NormLayer)
        if isinstance(layer, _CENTERING):
            self._drop_bias(name, layer)
        elif self._settings.norm_shift != "learned" and self._states[name].shift is not None:
            self._move_shift(name, layer)
        if self._norm.conv is not nn.Conv2d:
            self._standardize(name)
        self._note_losses(name, layer)

    def _leave_affine(self, name: str) -> None:
        """Let the layer before a norm that goes compute what both did in evaluation."""
        state = self._states[name]
        factor, addend = state.affine()
        try:
            before, layer = self._before.exclusive(name, state.channels)
        except LookupError as reason:
            trained = ["fixed" if values is None else "learned" for values in (state.scale, state.shift)]
            affine = ScaleAndShift(state.channels, scale=trained[0], shift=trained[1])  # type: ignore[arg-type]
            self.new[name] = self._in_place_of(self.new[name], affine, state)
            carry(changed(state, scale=factor, shift=addend), affine)
            self.notes[name] = f"a factor and an addend of each channel stay: {reason.args[0]}"
        else:
            trained_shift = layer.weight.requires_grad if state.shift is None else state.shift.requires_grad
            take_up(layer, factor, addend, trained=trained_shift)
            self.notes[before] = f"it computes what it and {name} did in evaluation"

    def _drop_bias(self, name: str, norm: NormLayer) -> None:
        """Take the bias from the layer before a norm that subtracts it again, and from the running mean, too."""
        state = self._states[name]
        try:
            before, layer = self._before.exclusive(name, state.channels)
        except LookupError:
            return
        without_statistics = isinstance(norm, RunningNorm) and state.mean is None
        if layer.bias is None or without_statistics:
            return
        if state.mean is not None:
            carry(changed(state, mean=state.mean - layer.bias.detach()), norm)
        layer.bias = None
        self.notes[before] = f"its bias is gone: {name} subtracts the mean of each channel"

    def _move_shift(self, name: str, norm: NormLayer) -> None:
        """Give the layer before a norm that learns no shift a bias that does, as Norm.replaces_bias wants it."""
        state = self._states[name]
        assert state.shift is not None
        try:
            before, layer = self._before.exclusive(name, state.channels)
        except LookupError as reason:
            self.notes[name] = f"the layer before it has not got its shift: {reason.args[0]}"
            return
        change = torch.zeros_like(state.shift, dtype=torch.float64) if norm.bias is not None else state.shift_before()
        old_bias = 0 if layer.bias is None else layer.bias.double()
        set_bias(layer, (old_bias + change).detach(), trained=state.shift.requires_grad)
        if state.mean is not None:
            carry(changed(state, mean=state.mean + change), norm)
        self.notes[before] = f"its bias has the shift of {name}, which learns none"

    def _standardize(self, name: str) -> None:
        try:
            done, reasons = self._before.standardize(name, set(self.new))
        except LookupError as reason:
            done, reasons = [], [str(reason.args[0])]
        self.notes |= dict.fromkeys(done, "its weights are standardized")
        if reasons:
            self.notes[name] = f"the layer before it is not standardized: {'; '.join(reasons)}"

    def _note_losses(self, name: str, layer: NormLayer) -> None:
        state = self._states[name]
        losses = []
        if state.scale is not None and layer.weight is None and bool((state.scale != 1).any()):
            losses.append("model.norm_scale is off: its scale is gone")
        if isinstance(layer, _CENTERING) and state.shift is not None and layer.bias is None and bool(state.shift.any()):
            losses.append("model.norm_shift is off: its shift is gone")
        if isinstance(layer, RunningNorm) and state.mean is None:
            losses.append("it had no running statistics: they start at mean 0 and variance 1")
        if losses:
            self.notes[name] = "; ".join([*([self.notes[name]] if name in self.notes else []), *losses])
