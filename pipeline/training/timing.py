"""What the steps of one rank spend their time on: waiting for data, computing, waiting for the other ranks."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass

from pipeline.training.result import TrainResult

# Steps at the start of an attempt that a throughput figure leaves out: memory is allocated, kernels are chosen.
WARM_UP_STEPS = 10


@dataclass
class Spent:
    """Seconds of ``steps`` optimizer steps.

    all_reduce_seconds : from this rank's last gradient to the sum over all; what overlaps the backward pass is free.
        On CUDA the host runs ahead of the device, and these are times of the host.
    """

    steps: int = 0
    data_wait_seconds: float = 0.0
    compute_seconds: float = 0.0
    all_reduce_seconds: float = 0.0

    def add(self, other: Spent) -> None:
        for name, value in asdict(other).items():
            setattr(self, name, getattr(self, name) + value)


class StepTimes:
    """A stopwatch. For each step: `begin`, `data_is_there`, `gradients_are_there`, `end`."""

    def __init__(self) -> None:
        self.steps = 0  # of this attempt
        self.last_seconds = self.last_data_wait_seconds = 0.0
        self._spent = Spent()
        self._begun = self._all_reduce = 0.0

    @property
    def steady(self) -> bool:
        return self.steps > WARM_UP_STEPS

    def begin(self) -> None:
        self._begun = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Of the step under way: what is no part of training."""
        self._begun += seconds

    def data_is_there(self) -> None:
        self.last_data_wait_seconds = time.perf_counter() - self._begun

    def gradients_are_there(self, computed_at: float | None) -> None:
        """computed_at : time.perf_counter() at this rank's last gradient; None where no others are waited for"""
        self._all_reduce = 0.0 if computed_at is None else time.perf_counter() - computed_at

    def end(self) -> None:
        self.steps += 1
        self.last_seconds = time.perf_counter() - self._begun
        compute = self.last_seconds - self.last_data_wait_seconds - self._all_reduce
        self._spent.add(Spent(1, self.last_data_wait_seconds, compute, self._all_reduce))

    def take(self) -> Spent:
        """What was spent since the last call."""
        spent, self._spent = self._spent, Spent()
        return spent


def describe(result: TrainResult) -> list[str]:
    """A line for each rank of a training: where the time of its steps went."""
    since = " since the last restart" if result.attempts > 1 else ""
    lines = []
    for rank in result.ranks:
        seconds = rank.data_wait_seconds + rank.compute_seconds + rank.all_reduce_seconds
        if not seconds:
            continue
        compute, data_wait = rank.compute_seconds / seconds, rank.data_wait_seconds / seconds
        parts = f"{compute:.0%} computing, {data_wait:.0%} waiting for data"
        if len(result.ranks) > 1:
            parts += f", {rank.all_reduce_seconds / seconds:.0%} for the other ranks"
        lines.append(f"rank {rank.rank}: {rank.steps:,} steps{since} in {seconds:.1f} s, {parts}")
    return lines
