"""LARS and LAMB: optimizers for large batches, whose step in each layer is as long as that layer's weights allow.

In a group with ``trust`` each parameter's step is scaled by a ratio of norms. In one without, as for biases and the
scales of norms, it is not: the authors' own programs leave those out, and give them no weight decay.

Nothing here makes the host wait for a device, and a learning rate may be a tensor: a step can be recorded as a CUDA
graph. All parameters of a group take every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

Group = dict[str, Any]  # as torch has it
Tensors = list[torch.Tensor]


class _Layerwise(torch.optim.Optimizer):
    """Takes the groups' parameters that have a gradient, group by group."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None, "the gradients are there already"
        for group in self.param_groups:
            weights, gradients = _with_gradients(group)
            if weights:
                self._update(weights, gradients, group)

    def _update(self, weights: Tensors, gradients: Tensors, group: Group) -> None:
        raise NotImplementedError


class LARS(_Layerwise):
    """Momentum with layer-wise adaptive rates (You, Gitman & Ginsburg 2017, algorithm 1).

    For a parameter w with gradient g, learning rate r, trust coefficient c, weight decay d and momentum m::

        local = c |w| / (|g| + d |w|)
        v = m v + r local (g + d w)
        w = w - v

    ``local`` is 1 where one of the norms is 0, and without ``trust``. As in the paper, v holds steps and not
    gradients: a rate that falls does not shorten the steps that are under way.

    Parameters
    ----------
    groups : iterable of dict
        ``params``, and what shall differ from the values below.
    lr, momentum, weight_decay, trust_coefficient : float
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 0.001,
    ):
        shared = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "capturable": True}
        super().__init__(groups, {**shared, "trust_coefficient": trust_coefficient, "trust": True})

    def _update(self, weights: Tensors, gradients: Tensors, group: Group) -> None:
        steps = [self._buffer(weight) for weight in weights]
        changes = torch._foreach_add(gradients, weights, alpha=group["weight_decay"])
        if group["trust"]:
            torch._foreach_mul_(changes, _local_rates(weights, gradients, group))
        torch._foreach_mul_(changes, group["lr"])
        torch._foreach_mul_(steps, group["momentum"])
        torch._foreach_add_(steps, changes)
        torch._foreach_sub_(weights, steps)

    def _buffer(self, weight: torch.Tensor) -> torch.Tensor:
        state = self.state[weight]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state["momentum_buffer"]


class LAMB(_Layerwise):
    """Adam with layer-wise adaptive steps (You et al. 2020, algorithm 2, with phi the identity).

    For a parameter w with gradient g at step t, learning rate r, betas b1 and b2, eps e and weight decay d::

        m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2
        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + e) + d w
        w = w - r (|w| / |u|) u

    The ratio is 1 where one of the norms is 0, and without ``trust``: the step is then AdamW's.

    Parameters
    ----------
    groups : iterable of dict
        ``params``, and what shall differ from the values below.
    lr, eps, weight_decay : float
    betas : tuple of 2 floats
    """

    def __init__(
        self,
        groups: Iterable[Group],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
    ):
        shared = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "capturable": True}
        super().__init__(groups, {**shared, "trust": True})

    def _update(self, weights: Tensors, gradients: Tensors, group: Group) -> None:
        changes = self._adam(weights, gradients, group)
        torch._foreach_add_(changes, weights, alpha=group["weight_decay"])
        if group["trust"]:
            torch._foreach_mul_(changes, _ratio(_norms(weights), _norms(changes)))
        torch._foreach_mul_(changes, group["lr"])
        torch._foreach_sub_(weights, changes)

    def _adam(self, weights: Tensors, gradients: Tensors, group: Group) -> Tensors:
        """Take up the gradients, and return Adam's direction of each parameter."""
        first, second = group["betas"]
        states = [self._moments(weight) for weight in weights]
        means, squares = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        counts = [state["step"] for state in states]
        torch._foreach_add_(counts, 1)
        done = counts[0].double()  # 1 - 0.999 in float32 is wrong in its fifth digit
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        roots = torch._foreach_sqrt(squares)
        torch._foreach_div_(roots, (1 - torch.pow(second, done)).sqrt())
        torch._foreach_add_(roots, group["eps"])
        changes = torch._foreach_div(means, roots)
        torch._foreach_div_(changes, 1 - torch.pow(first, done))
        return list(changes)

    def _moments(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        state = self.state[weight]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(weight, memory_format=torch.preserve_format)
        return state


def _with_gradients(group: Group) -> tuple[Tensors, Tensors]:
    pairs = [(weight, weight.grad) for weight in group["params"] if weight.grad is not None]
    return [weight for weight, _ in pairs], [gradient for _, gradient in pairs]


def _local_rates(weights: Tensors, gradients: Tensors, group: Group) -> Tensors:
    weight, gradient = _norms(weights), _norms(gradients)
    decayed = torch.where(gradient > 0, gradient + group["weight_decay"] * weight, gradient)
    return _ratio(weight, decayed, group["trust_coefficient"])


def _norms(tensors: Tensors) -> torch.Tensor:
    """The L2 norm of each tensor, float64 (number of tensors,)."""
    return torch.stack([norm.double() for norm in torch._foreach_norm(tensors)])


def _ratio(weight: torch.Tensor, change: torch.Tensor, factor: float = 1.0) -> Tensors:
    """``factor * weight / change`` of each norm as scalars; 1 where one of the two is 0."""
    ratio = torch.where((weight > 0) & (change > 0), factor * weight / change, torch.ones_like(weight))
    return list(ratio.unbind())
