"""SGD as the literature on batch normalization at scale uses it, and its learning-rate schedule."""

from __future__ import annotations

import math

import torch
from torch import nn

from pipeline.config import TrainSettings


def learning_rate_factor(step: int, *, total_steps: int, warmup_steps: int) -> float:
    """Share of the peak learning rate at a step: linear warm-up (Goyal et al. 2017, section 2.2), then a cosine to 0
    (Loshchilov & Hutter 2017, equation 5)."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, train: TrainSettings) -> torch.optim.SGD:
    """SGD with Nesterov momentum. Norm parameters and biases, the ones with a single axis, do not decay."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": train.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=train.learning_rate, momentum=train.momentum, nesterov=train.momentum > 0)
