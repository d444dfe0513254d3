"""Batch normalization (Ioffe & Szegedy 2015, algorithms 1 and 2), with statistics of a rank, a lane, or the world."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch.nn import functional as F

from models.norms.base import MeanVarianceNorm
from models.norms.segments import are_fast, normalize_segments
from models.norms.synchronized import SumOverRanks, normalize_over_ranks

Statistics = Literal["rank", "lane", "world"]


class BatchNorm(MeanVarianceNorm):
    """The layer computes ``y = weight * (x - mean) / sqrt(var + eps) + bias`` for each channel, with mean and variance
    over the batch and all positions (Ioffe & Szegedy 2015, algorithm 1).

    The batch is normalized with its biased variance; the running estimate takes the unbiased one, as torch's does.
    Input and output have shape (N, C, ...) and any float dtype. The rows of a batch are those of its lanes, one lane
    after the other, each N / ``lanes`` of them.

    Parameters
    ----------
    channels : int
        C, the size of axis 1.
    statistics : "rank", "lane" or "world"
        The rows whose statistics a batch is normalized with.

        rank : those of this process, as in DistributedDataParallel and Horovod.
        lane : those of each lane, apart from one another (ghost batch normalization, Hoffer et al. 2017): the same
            result for any number of ranks. The running estimates are means over lanes.
        world : those of all processes together (synchronized). Ranks may have different numbers of rows.
    options
        The other parameters of `RunningNorm`.

    Attributes
    ----------
    lanes : int
        The lanes in each of the batches to come; 1 makes ``lane`` the same as ``rank``.
    sum_over_ranks : callable or None
        A function that sums a tensor over all ranks, in place, and returns it; None makes ``world`` the same as
        ``rank``.

    Raises
    ------
    ValueError
        In training, a channel has only one value, or the lanes do not divide the rows.
    """

    def __init__(self, channels: int, *, statistics: Statistics = "rank", **options):
        super().__init__(channels, **options)
        self.statistics = statistics
        self.lanes = 1
        self.sum_over_ranks: SumOverRanks | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training and self.statistics == "lane" and self.lanes > 1:
            return self._by_lane(x)
        if self.training and self.statistics == "world" and self.sum_over_ranks is not None:
            return self._over_ranks(x, self.sum_over_ranks)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def _by_lane(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) % self.lanes:
            raise ValueError(f"batch norm by lane: {self.lanes} lanes do not divide a batch of {len(x)} rows")
        rows = x.numel() // (self.channels * self.lanes)
        if are_fast(x) and rows > 1:  # for one row alone torch has an error
            y, statistics = normalize_segments(x, self.weight, self.bias, self.eps, segments=self.lanes)
            mean, variance = statistics.mean(1)
            self._update(mean, variance * (rows / (rows - 1)))
            return y
        # A momentum of 1 leaves the batch's own mean and unbiased variance in the buffers.
        means = self.running_mean.new_zeros(self.lanes, self.channels)
        variances = torch.zeros_like(means)
        parts = [
            F.batch_norm(part, mean, variance, self.weight, self.bias, True, 1.0, self.eps)
            for part, mean, variance in zip(x.chunk(self.lanes), means, variances, strict=True)
        ]
        self._update(means.mean(0), variances.mean(0))
        return torch.cat(parts)

    def _over_ranks(self, x: torch.Tensor, sum_over_ranks: SumOverRanks) -> torch.Tensor:
        y, mean, variance, total = normalize_over_ranks(x, self.weight, self.bias, self.eps, sum_over_ranks)
        self._update(mean, variance * (total / (total - 1)))
        return y

    def join(self, running: Mapping[str, torch.Tensor], shares: torch.Tensor) -> dict[str, torch.Tensor]:
        # Lanes are random parts of one shuffled split, and their variances are unbiased: the mean over lanes is the
        # same for any number of ranks.
        if self.statistics == "lane":
            return {name: (shares * values).sum(0) for name, values in running.items()}
        return super().join(running, shares)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, momentum={self.momentum}, statistics={self.statistics}"
