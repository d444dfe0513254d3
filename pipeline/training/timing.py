"""What the steps of one rank spend their time on: waiting for data, computing, waiting for the other ranks."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from pipeline.distributed.worker import Worker
from pipeline.training.result import RankSeconds

# Steps at the start of an attempt that a throughput figure leaves out: memory is allocated, kernels are chosen.
WARM_UP_STEPS = 10


@dataclass
class StepSeconds:
    """Seconds of ``steps`` optimizer steps of one rank, by what they were spent on.

    all_reduce_seconds : from this rank's last gradient to the sum over all; what overlaps the backward pass is free.
        A GPU's own time, of the step before: the host runs ahead of it.
    """

    steps: int = 0
    data_wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    all_reduce_seconds: float = 0.0

    def add(self, other: StepSeconds) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


class StepTimes:
    """The stopwatch of one rank. A step calls `begin`, `data_arrived`, `gradients_arrived` and `end`."""

    def __init__(self, world_size: int = 1) -> None:
        self.steps = 0  # of this attempt
        self.last_seconds = self.last_data_wait_seconds = 0.0
        self._since = StepSeconds()
        self._totals = [StepSeconds() for _ in range(world_size)]
        self._begun = self._all_reduce = 0.0

    @property
    def steady(self) -> bool:
        return self.steps > WARM_UP_STEPS

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count these seconds of the step under way: they were spent on something that is not training."""
        self._begun += seconds

    def data_arrived(self) -> None:
        self.last_data_wait_seconds = time.perf_counter() - self._begun

    def gradients_arrived(self, waited_seconds: float) -> None:
        """waited_seconds : since this rank's last gradient, for those of the others"""
        self._all_reduce = waited_seconds

    def end(self) -> None:
        self.steps += 1
        self.last_seconds = time.perf_counter() - self._begun
        compute = self.last_seconds - self.last_data_wait_seconds - self._all_reduce
        self._since.add(StepSeconds(1, self.last_data_wait_seconds, compute, self._all_reduce))

    def take(self) -> StepSeconds:
        """What this rank's steps took since the last call."""
        since, self._since = self._since, StepSeconds()
        return since

    def gather(self, worker: Worker) -> list[RankSeconds]:
        """What the steps of each rank took since the last call. Every rank calls it and gets the same."""
        ranks = worker.gather(self.take())
        for total, since in zip(self._totals, ranks, strict=True):
            total.add(since)
        return _by_rank(ranks)

    def totals(self) -> list[RankSeconds]:
        """What the steps of each rank took in this attempt, up to the last `gather`."""
        return _by_rank(self._totals)


def _by_rank(ranks: list[StepSeconds]) -> list[RankSeconds]:
    return [RankSeconds(rank=rank, **asdict(seconds)) for rank, seconds in enumerate(ranks)]
