"""Random numbers of a global batch, of which each rank takes those of its own rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for is part of their seed, so that no change moves the draws of another.

    The numbers of `pipeline.data.plan` are below these.
    """

    CROP = 101
    COLOUR = 102
    COLOUR_ORDER = 103
    MIX_WITH = 104
    MIX_SHARE = 105
    MIX_KIND = 106
    MIX_PLACE = 107


@dataclass(frozen=True)
class BatchRows:
    """The rows that one rank has of a global batch, lane after lane.

    seed, step : of the training, and of the batch
    lanes, num_lanes : the lanes of this rank, and of the run
    lane_rows : rows of each lane
    """

    seed: int
    step: int
    lanes: Sequence[int]
    num_lanes: int
    lane_rows: int

    @property
    def count(self) -> int:
        return len(self.lanes) * self.lane_rows

    def generator(self, purpose: Purpose) -> np.random.Generator:
        """A generator for one purpose of this step, the same on every rank."""
        return np.random.default_rng([purpose, self.seed, self.step])

    def own(self, values: np.ndarray) -> np.ndarray:
        """This rank's part, (rows, ...), of an array of the whole global batch, (lanes, rows of a lane, ...)."""
        return values[list(self.lanes)].reshape(self.count, *values.shape[2:])

    def shape(self, *more: int) -> tuple[int, ...]:
        """The shape of an array of the whole global batch, for `own`."""
        return (self.num_lanes, self.lane_rows, *more)


def on_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on the device; from pinned memory, since the host would wait for any other copy to CUDA."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values


def array_on_device(values: np.ndarray, device: torch.device) -> torch.Tensor:
    return on_device(torch.from_numpy(np.ascontiguousarray(values)), device)
