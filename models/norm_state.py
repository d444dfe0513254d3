"""What a normalization layer of torch, of this package or of others knows of its channels, and what a new one takes
over."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from models.norms.base import NormLayer, RunningNorm

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


@dataclass(frozen=True)
class NormState:
    """The numbers of one normalization layer, for C channels.

    Attributes
    ----------
    channels : int
        C.
    eps : float or None
        What it adds to a variance; None where the layer does not say.
    momentum : float or None
        The weight of the new batch in its running statistics; None is a cumulative average, or no statistics.
    scale, shift : Tensor of shape (C,) or None
        Parameters, or buffers that are not learned.
    mean, variance : Tensor of shape (C,) or None
        The running statistics; both or neither.
    """

    channels: int
    eps: float | None
    momentum: float | None
    scale: torch.Tensor | None
    shift: torch.Tensor | None
    mean: torch.Tensor | None
    variance: torch.Tensor | None

    @torch.no_grad()
    def affine(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the factor and the addend that the layer applies in evaluation, of shape (C,) and dtype float64.

        Without running statistics a mean of 0 and a variance of 1 are taken, and no eps.
        """
        like = self.like()
        device = like.device if like is not None else None
        factor = torch.ones(self.channels, dtype=torch.float64, device=device)
        addend = torch.zeros_like(factor)
        if self.mean is not None and self.variance is not None:
            factor = (self.variance.double() + (self.eps or 0.0)).rsqrt()
        if self.scale is not None:
            factor = factor * self.scale.double()
        if self.mean is not None:
            addend = -self.mean.double() * factor
        return factor, addend if self.shift is None else addend + self.shift.double()

    @torch.no_grad()
    def shift_before(self) -> torch.Tensor:
        """Return what, added before a norm without a shift, stands for the shift: ``shift * sqrt(var + eps) - mean``,
        of shape (C,) and dtype float64.

        It centers a channel and moves it by the shift, counted in the channel's standard deviations.
        """
        assert self.shift is not None
        shift = self.shift.double()
        if self.mean is None or self.variance is None:
            return shift
        return shift * (self.variance.double() + (self.eps or 0.0)).sqrt() - self.mean.double()

    def like(self) -> torch.Tensor | None:
        """Return a tensor that has the layer's dtype and device, if it holds any."""
        return next((values for values in (self.scale, self.shift, self.mean) if values is not None), None)


def state_of(layer: nn.Module) -> NormState:
    """Return what a normalization layer holds.

    Raises
    ------
    ValueError
        It does not normalize channels at axis 1, or has parameters that are computed; the message says so.
    """
    kind = type(layer).__name__
    if isinstance(layer, (nn.LayerNorm, nn.RMSNorm)):
        raise ValueError(f"{kind} normalizes the last axes, not channels at axis 1")
    if hasattr(layer, "parametrizations"):
        raise ValueError("its parameters are computed by torch.nn.utils.parametrize")
    scale, shift = (_vector(layer, name) for name in ("weight", "bias"))
    mean, variance = _statistics(layer)
    channels = next(
        (getattr(layer, n) for n in ("num_features", "num_channels", "channels") if hasattr(layer, n)), None
    )
    known = next((len(values) for values in (scale, mean) if values is not None), channels)
    if not isinstance(known, int):
        raise ValueError(f"{kind} does not say how many channels it has")
    return NormState(known, getattr(layer, "eps", None), getattr(layer, "momentum", None), scale, shift, mean, variance)


def _vector(layer: nn.Module, name: str) -> torch.Tensor | None:
    values = getattr(layer, name, None)
    return values if isinstance(values, torch.Tensor) and values.ndim == 1 else None


def _statistics(layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if isinstance(layer, RunningNorm):
        mean, square = layer.population()
        return mean, square - layer.eps
    running_mean, running_var = (_vector(layer, name) for name in ("running_mean", "running_var"))
    return (None, None) if running_mean is None or running_var is None else (running_mean, running_var)


@torch.no_grad()
def carry(state: NormState, layer: NormLayer) -> None:
    """Give a new layer the scale, the shift and the running statistics of another, as far as it has them."""
    for values, own in ((state.scale, layer.weight), (state.shift, layer.bias)):
        if values is not None and own is not None:
            own.copy_(values)
    if isinstance(layer, RunningNorm) and state.mean is not None and state.variance is not None:
        layer.set_population(state.mean, state.variance)


def carry_training(state: NormState, layer: NormLayer) -> None:
    """Let scale and shift of a new layer require gradients where those of another do."""
    for values, own in ((state.scale, layer.weight), (state.shift, layer.bias)):
        if values is not None and isinstance(own, nn.Parameter):
            own.requires_grad_(values.requires_grad)


def carry_hooks(old: nn.Module, new: nn.Module) -> None:
    """Give a module that takes the place of another its hooks on the forward and backward pass."""
    for name in _HOOKS:
        getattr(new, name).update(getattr(old, name))
    new._is_full_backward_hook = old._is_full_backward_hook
