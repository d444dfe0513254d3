"""Batch renormalization (Ioffe 2017): batch norm that trains with, nearly, what it evaluates with."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.nn import functional as F

from models.norms.base import RunningNorm, multiply_add, per_channel, total_variance


class BatchRenorm(RunningNorm):
    """The layer computes ``y = weight * (x_hat * r + d) + bias`` (Ioffe 2017, algorithm 1), with x_hat as in batch
    norm.

    No gradient flows through r and d, which take the batch's statistics to the running ones, within bounds::

        r = clip(sigma_batch / sigma, 1 / r_max, r_max),  d = clip((mu_batch - mu) / sigma, -d_max, d_max)

    sigma_batch is ``sqrt(biased variance + eps)``; mu and sigma are running averages of mu_batch and sigma_batch, and
    what evaluation uses. Input and output have shape (N, C, ...) and any float dtype.

    Parameters
    ----------
    channels : int
        C, the size of axis 1.
    r_max, d_max : float
        The values that the two bounds reach.
    warmup_steps : int
        The training steps of plain batch norm (r_max 1, d_max 0). After them r_max grows to its value for 7 times as
        many steps, and d_max for 4 times as many (section 4.1: 5,000, up to 40,000 and 25,000).
    options
        The other parameters of `RunningNorm`.

    Attributes
    ----------
    running_mean, running_std : Tensor of shape (C,) and dtype float32
    steps : Tensor of shape () and dtype int64
        The forward passes in training that were made.
    passes_per_step : int
        How many of them are one training step.
    """

    running_mean: torch.Tensor
    running_std: torch.Tensor
    steps: torch.Tensor
    passes_per_step = 1

    def __init__(self, channels: int, *, r_max: float = 3.0, d_max: float = 5.0, warmup_steps: int = 5_000, **options):
        super().__init__(channels, **options)
        self.r_max, self.d_max, self.warmup_steps = r_max, d_max, warmup_steps
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_std", torch.ones(channels))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return r_max and d_max at this step, as tensors of shape (): a step does not wait for a GPU."""
        warmup = self.warmup_steps * self.passes_per_step
        past = (self.steps - warmup).double() / max(1, warmup)
        return 1 + (self.r_max - 1) * (past / 7).clamp(0, 1), self.d_max * (past / 4).clamp(0, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            factor, addend = self.evaluation_affine()
            return (x * per_channel(factor, x) + per_channel(addend, x)).to(x.dtype)  # the sum may nearly cancel
        mean, variance = torch.zeros_like(self.running_mean), torch.zeros_like(self.running_mean)
        # A momentum of 1 leaves the batch's own mean and unbiased variance in the buffers.
        x_hat = F.batch_norm(x, mean, variance, None, None, True, 1.0, self.eps)
        count = x.numel() // x.shape[1]
        std = (variance * ((count - 1) / count) + self.eps).sqrt()
        r_max, d_max = (bound.to(std.dtype) for bound in self.bounds())
        r = (std / self.running_std).clamp(1 / r_max, r_max)
        d = ((mean - self.running_mean) / self.running_std).clamp(-d_max, d_max)
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_std.lerp_(std, self.momentum)
            self.steps += 1
        if self.weight is not None:
            r, d = r * self.weight, d * self.weight
        return multiply_add(x_hat, r, d if self.bias is None else d + self.bias)

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        mean, variance = total_variance(running["running_mean"], running["running_std"] ** 2, shares)
        return {"running_mean": mean, "running_std": variance.sqrt()}

    def set_population(self, mean: torch.Tensor, variance: torch.Tensor) -> None:
        self.running_mean.copy_(mean)
        self.running_std.copy_((variance + self.eps).sqrt())

    def population(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.running_mean, self.running_std**2
