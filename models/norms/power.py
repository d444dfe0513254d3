"""Power normalization (Shen et al. 2020): batch norm for transformers, by the quadratic mean and without centering."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from models.norms.base import RunningNorm, per_channel


class PowerNorm(RunningNorm):
    """The layer computes ``y = weight * x / psi + bias``, psi the square root of eps plus a running average of the
    batch's mean square (Shen et al. 2020).

    Training normalizes with the average before this batch, and its backward pass is the paper's approximation
    (algorithm 2; nu, Gamma and Lambda have shape (C,), means are over the batch and positions)::

        dx  = (g - nu * x_hat) / psi
        nu <- nu * (1 - a * Gamma) + a * Lambda,  Gamma = mean(x_hat ** 2), Lambda = mean(g * x_hat)

    with g the gradient by x_hat and a = 1 - alpha. In the first ``warmup_steps`` of training it is the paper's PN-V:
    psi is the batch's own, nu is Lambda, which makes the gradient exact, and only the running average of the mean
    square is updated. Input and output have shape (N, C, ...) and any float dtype.

    Parameters
    ----------
    channels : int
        C, the size of axis 1.
    warmup_steps : int
        The training steps of PN-V.
    options
        The other parameters of `RunningNorm`; the momentum is 1 - alpha of the forward and of the backward pass.

    Attributes
    ----------
    running_square, running_nu : Tensor of shape (C,) and dtype float32
    steps : Tensor of shape () and dtype int64
        The forward passes in training that were made.
    passes_per_step : int
        How many of them are one training step.
    """

    running_square: torch.Tensor
    running_nu: torch.Tensor
    steps: torch.Tensor
    passes_per_step = 1

    def __init__(self, channels: int, *, warmup_steps: int = 4_000, **options):
        super().__init__(channels, **options)
        self.warmup_steps = warmup_steps
        self.register_buffer("running_square", torch.ones(channels))
        self.register_buffer("running_nu", torch.zeros(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return self._scale_and_shift((x * per_channel((self.running_square + self.eps).rsqrt(), x)).to(x.dtype))
        in_warmup = self.steps < self.warmup_steps * self.passes_per_step
        x_hat, square = _Normalized.apply(
            x, self.running_square.clone(), self.running_nu, in_warmup, self.momentum, self.eps
        )
        with torch.no_grad():
            self.running_square.lerp_(square, self.momentum)
            self.steps += 1
        return self._scale_and_shift(x_hat)

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: (shares * values).sum(0) for name, values in running.items()}

    def set_population(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.running_square.copy_(variance + mean**2)

    def population(self) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros_like(self.running_square), self.running_square + self.eps


class _Normalized(torch.autograd.Function):
    """Return x / psi and the batch's mean square; backward updates nu in place. ``torch.where`` chooses between warm-up
    and after, so that no step waits for a GPU to tell its counter."""

    @staticmethod
    def forward(ctx, x, running_square, nu, in_warmup, weight_of_new, eps):
        square = (x**2).mean([0, *range(2, x.ndim)]).to(running_square.dtype)
        inverse = per_channel((torch.where(in_warmup, square, running_square) + eps).rsqrt(), x).to(x.dtype)
        x_hat = x * inverse
        ctx.save_for_backward(x_hat, inverse, in_warmup)
        ctx.nu, ctx.weight_of_new = nu, weight_of_new
        ctx.mark_non_differentiable(square)
        return x_hat, square

    @staticmethod
    def backward(ctx, grad, _):
        x_hat, inverse, in_warmup = ctx.saved_tensors
        axes = [0, *range(2, grad.ndim)]
        gamma, product = ((values * x_hat).mean(axes).to(ctx.nu.dtype) for values in (x_hat, grad))
        nu = torch.where(in_warmup, product, ctx.nu)
        new = ctx.nu * (1 - ctx.weight_of_new * gamma) + ctx.weight_of_new * product
        ctx.nu.copy_(torch.where(in_warmup, ctx.nu, new))
        return (grad - per_channel(nu, grad).to(grad.dtype) * x_hat) * inverse, None, None, None, None, None
