"""What holds gradients within bounds, between their exchange and the update: equal on all ranks, as gradients are."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import nn

from pipeline.config.optimizer import OptimizerSettings

# The length that weights count at least, so that those that start at 0 can move (Brock et al. 2021, section 4.1).
_LEAST_WEIGHT = 1e-3
# The length that gradients count at least, below which none is divided.
_LEAST_GRADIENT = 1e-6


def make_clip(model: nn.Module, train: OptimizerSettings, head: Collection[str] = ()) -> Callable[[], None] | None:
    """A function that clips the gradients of a network as the settings say; None where they say nothing.

    It makes the host wait for no device, and can be recorded as a CUDA graph.

    Parameters
    ----------
    head : names of the parameters that ``train.clip_adaptive`` leaves alone
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if train.clip_norm is not None:
        bound, parameters = train.clip_norm, list(trained.values())

        def clip_norm() -> None:
            nn.utils.clip_grad_norm_(parameters, bound)

        return clip_norm
    if train.clip_adaptive is not None:
        share, others = train.clip_adaptive, [p for name, p in trained.items() if name not in head]
        return lambda: clip_by_weights(others, share)
    return None


@torch.no_grad()
def clip_by_weights(parameters: Collection[torch.Tensor], share: float) -> None:
    """Adaptive gradient clipping (Brock et al. 2021, equation 3). For each unit i with weights W and gradient G::

        G_i = G_i * min(1, share * max(|W_i|, 1e-3) / |G_i|)

    A unit is what one output of a layer is computed with: an entry of axis 0. Of a bias or a norm's scale, the whole
    parameter is one unit, as in the authors' program.
    """
    for parameter in parameters:
        if parameter.grad is None:
            continue
        bound = share * _unit_norms(parameter).clamp(min=_LEAST_WEIGHT)
        parameter.grad.mul_((bound / _unit_norms(parameter.grad).clamp(min=_LEAST_GRADIENT)).clamp(max=1))


def _unit_norms(values: torch.Tensor) -> torch.Tensor:
    """L2 norms of shape (units, 1, ...), or a scalar."""
    if values.ndim <= 1:
        return torch.linalg.vector_norm(values)
    return torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True)
