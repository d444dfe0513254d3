"""The optimizer of a training, and its learning rate and momentum by step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Collection

import torch
from torch import nn

from pipeline.config.training import TrainSettings
from pipeline.training.checkpoint import State
from pipeline.training.layerwise import LAMB, LARS, Group

# One cycle: the share of training that the rate rises, and what the peak is divided by at the start and at the end.
_RISE, _START, _END = 0.3, 25.0, 2.5e5
# How far momentum goes down while the rate goes up.
_MOMENTUM_CYCLE = 0.1
# What a group multiplies the schedule's learning rate by, where it does.
_RATE_FACTOR = "rate_factor"
# What of a group says how an update is computed, which the device decides.
_HOW = ("fused", "foreach", "capturable")


class Schedule:
    """Learning rate and momentum at each step.

    With ``train.base_batch_size`` the rate is scaled by k = batch / base batch (linear scaling rule, Goyal et al. 2017,
    section 2.1) and warm-up goes from the unscaled rate to the scaled one (section 2.2, gradual warm-up); otherwise it
    begins near 0.

    After warm-up, with t from 0 to 1 over the rest: ``cosine`` is (1 + cos(pi t)) / 2 (Loshchilov & Hutter 2017,
    equation 5), ``linear`` is 1 - t, ``constant`` is 1. ``one_cycle`` (Smith & Topin 2018) has no warm-up but
    rises from 1/25 of the peak over the first 30% and falls to 4e-6 of it, both along half a cosine, while momentum
    goes down by 0.1 and up again.

    With ``train.first_cycle_epochs`` this begins anew at every end of a cycle, each a whole schedule of its own length
    (warm restarts, SGDR, Loshchilov & Hutter 2017, section 3, with T_mult = 2): see `cycle_ends`. Momentum buffers and
    all else go on. Warm-up is then at most half of a cycle, so that each reaches the peak.

    cycle_ends : optimizer steps done at the end of each cycle, ascending; the last is all steps of the training
    """

    def __init__(self, train: TrainSettings, steps_per_epoch: int):
        self.steps_per_epoch = steps_per_epoch
        self.cycle_ends = cycle_ends(train, steps_per_epoch)
        self._train = train
        self._warmup = round(train.warmup_epochs * steps_per_epoch)
        self._scale = train.global_batch / train.base_batch_size if train.base_batch_size else 1.0

    def learning_rate(self, step: int) -> float:
        return self._train.learning_rate * self._scale * self._factor(*self._cycle(step))

    def momentum(self, step: int) -> float:
        if self._train.schedule != "one_cycle":
            return self._train.momentum
        lowest = max(0.0, self._train.momentum - _MOMENTUM_CYCLE)
        rising, part = _rise(*self._cycle(step))
        if rising:
            return _between(self._train.momentum, lowest, part)
        return _between(lowest, self._train.momentum, part)

    def _cycle(self, step: int) -> tuple[int, int]:
        """The step within its cycle, and the steps of that cycle; a step after the last is of the last."""
        number = min(bisect_right(self.cycle_ends, step), len(self.cycle_ends) - 1)
        start = self.cycle_ends[number - 1] if number else 0
        return step - start, self.cycle_ends[number] - start

    def _factor(self, step: int, steps: int) -> float:
        if self._train.schedule == "one_cycle":
            rising, part = _rise(step, steps)
            return _between(1 / _START, 1.0, part) if rising else _between(1.0, 1 / _END, part)
        warmup = self._warmup if self._train.first_cycle_epochs is None else min(self._warmup, steps // 2)
        if step < warmup:
            first = 1 / self._scale if self._scale > 1 else 0.0
            return first + (1 - first) * (step + 1) / warmup
        done = (step - warmup) / max(1, steps - warmup)
        if self._train.schedule == "constant":
            return 1.0
        return 1 - done if self._train.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))


def cycle_ends(train: TrainSettings, steps_per_epoch: int) -> tuple[int, ...]:
    """Optimizer steps done at the end of each cycle of the schedule, ascending.

    With a first cycle of c steps they are c, 3c, 7c, ... below the steps of the training, and then those. Without
    ``train.first_cycle_epochs`` the training is one cycle.
    """
    steps = steps_per_epoch * train.epochs
    if train.first_cycle_epochs is None:
        return (steps,)
    first = max(1, round(train.first_cycle_epochs * steps_per_epoch))
    whole = [first * (2**number - 1) for number in range(1, steps.bit_length() + 1)]
    return (*(end for end in whole if end < steps), steps)


def _rise(step: int, steps: int) -> tuple[bool, float]:
    """Whether the rate of one_cycle rises at a step of a cycle of so many, and how much of that part is done."""
    peak = _RISE * steps
    return (True, step / peak) if step < peak else (False, (step - peak) / max(1.0, steps - 1 - peak))


def _between(start: float, end: float, part: float) -> float:
    """Half a cosine from ``start`` to ``end``."""
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, part)))


def make_optimizer(model: nn.Module, train: TrainSettings, head: Collection[str] = ()) -> torch.optim.Optimizer:
    """The optimizer of the settings. Norm parameters and biases, the ones with a single axis, do not decay, and LARS
    and LAMB take their steps as they are.

    On CUDA all parameters of SGD and AdamW are updated by one kernel.

    Parameters
    ----------
    head : names of the parameters that ``train.head_learning_rate`` is for
    """
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    parts = [[p for name, p in trained if name not in head], [p for name, p in trained if name in head]]
    factors = [1.0, (train.head_learning_rate or train.learning_rate) / train.learning_rate]
    if factors[1] == 1.0:
        parts = [[parameter for _, parameter in trained]]
    groups: list[Group] = []
    for part, factor in zip(parts, factors, strict=False):
        for decays in (True, False):
            parameters = [p for p in part if (p.ndim > 1) == decays]
            group = {"params": parameters, "weight_decay": train.weight_decay if decays else 0.0}
            if train.optimizer in ("lars", "lamb"):
                group["trust"] = decays
            groups.append(group if factor == 1.0 else {**group, _RATE_FACTOR: factor})
    return _MAKERS[train.optimizer](groups, train, all(p.is_cuda for _, p in trained))


def _sgd(groups: list[Group], train: TrainSettings, on_cuda: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        groups,
        lr=train.learning_rate,
        momentum=train.momentum,
        nesterov=train.momentum > 0,
        fused=True if on_cuda else None,
    )


def _adamw(groups: list[Group], train: TrainSettings, on_cuda: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        groups,
        lr=train.learning_rate,
        betas=(train.momentum, train.beta2),
        eps=train.optimizer_eps or 1e-8,
        fused=True if on_cuda else None,
        capturable=on_cuda and train.cuda_graphs,
    )


def _lars(groups: list[Group], train: TrainSettings, on_cuda: bool) -> torch.optim.Optimizer:
    return LARS(groups, lr=train.learning_rate, momentum=train.momentum, trust_coefficient=train.trust_coefficient)


def _lamb(groups: list[Group], train: TrainSettings, on_cuda: bool) -> torch.optim.Optimizer:
    betas = (train.momentum, train.beta2)
    return LAMB(groups, lr=train.learning_rate, betas=betas, eps=train.optimizer_eps or 1e-6)


_MAKERS: dict[str, Callable[[list[Group], TrainSettings, bool], torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "adamw": _adamw,
    "lars": _lars,
    "lamb": _lamb,
}


def set_rates(optimizer: torch.optim.Optimizer, learning_rate: float, momentum: float) -> None:
    """Give an optimizer of `make_optimizer` the numbers of the next step. In Adam's kind, momentum is beta1."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get(_RATE_FACTOR, 1.0)
        if "betas" in group:
            group["betas"] = (momentum, group["betas"][1])
        else:
            group["momentum"] = momentum


def load_optimizer(optimizer: torch.optim.Optimizer, state: State) -> None:
    """Load a state that may have been saved on another kind of device: how the update is computed stays as it is here,
    and counts of steps come to where it looks for them."""
    how = [{name: group[name] for name in _HOW if name in group} for group in optimizer.param_groups]
    saved = [{**group, **here} for group, here in zip(state["param_groups"], how, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": saved})
