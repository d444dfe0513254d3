"""Norm layers for 6 channels in float64, and the papers' formulas in numpy."""

import numpy as np
import torch

from models import NORMS
from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings

EPS, MOMENTUM = 1e-3, 0.25
X = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 6, 5, 3))
RUNNING = sorted(name for name in NORMS if make_norm(ModelSettings(norm=name)).keeps_statistics)


def make(norm, **settings):
    """A layer for 6 channels in float64, with random parameters."""
    given = {"norm_groups": 3, "norm_eps": EPS, "norm_momentum": MOMENTUM, "width": 6, "norm_warmup_steps": 2}
    made = make_norm(ModelSettings(norm=norm, **{**given, **settings})).layer(6).double()
    random = np.random.default_rng(1)
    for parameter in made.parameters():
        parameter.data.copy_(torch.from_numpy(random.normal(size=parameter.shape)))
    return made


def standardized(x, axes, eps=EPS):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


def wide(values_c):
    return np.asarray(values_c).reshape(1, -1, 1, 1)


def number(tensor):
    return tensor.detach().numpy()


def scaled(x, made):
    return x * wide(number(made.weight)) + wide(number(made.bias))


def switched(x, made, batch_mean, batch_var):
    """Luo et al. 2019, equation 3, each statistic from its own axes."""
    for_mean, for_var = (np.exp(number(w)) / np.exp(number(w)).sum() for w in (made.mean_weights, made.var_weights))
    means = [x.mean((2, 3), keepdims=True), x.mean((1, 2, 3), keepdims=True), wide(batch_mean)]
    variances = [x.var((2, 3), keepdims=True), x.var((1, 2, 3), keepdims=True), wide(batch_var)]
    mean = sum(w * m for w, m in zip(for_mean, means, strict=True))
    var = sum(w * v for w, v in zip(for_var, variances, strict=True))
    return scaled((x - mean) / np.sqrt(var + EPS), made)
