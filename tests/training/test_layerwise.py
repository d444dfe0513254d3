"""LARS and LAMB against their papers' formulas in numpy, and against torch's AdamW where the two are the same."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.training.layerwise import LAMB, LARS

STEPS, RATE, DECAY = 7, 0.3, 0.01
SHAPES = ((4, 3, 3, 3), (5, 4), (5,))


def drawn():
    """Weights, and the gradients of each step, as numpy arrays in float64."""
    random = np.random.default_rng(3)
    weights = [random.normal(size=shape) for shape in SHAPES]
    return weights, [[random.normal(size=shape) for shape in SHAPES] for _ in range(STEPS)]


def trained(make, dtype=torch.float64):
    """The weights after all steps; matrices decay and are trusted, vectors neither."""
    weights, gradients = drawn()
    parameters = [nn.Parameter(torch.tensor(weight, dtype=dtype)) for weight in weights]
    optimizer = make(
        [
            {"params": parameters[:2], "weight_decay": DECAY, "trust": True},
            {"params": parameters[2:], "weight_decay": 0.0, "trust": False},
        ]
    )
    for step in gradients:
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(gradient, dtype=dtype)
        optimizer.step()
    return [parameter.detach().numpy() for parameter in parameters]


def norm(values):
    return np.sqrt((values**2).sum())


@pytest.mark.parametrize("trust", [0.001, 0.02])
def test_lars_is_the_papers(trust):
    """You, Gitman & Ginsburg 2017, algorithm 1."""
    expected, gradients = drawn()
    velocity = [np.zeros(shape) for shape in SHAPES]
    for step in gradients:
        for n, g in enumerate(step):
            w, decay = expected[n], DECAY if n < 2 else 0
            local = trust * norm(w) / (norm(g) + decay * norm(w)) if n < 2 else 1
            velocity[n] = 0.9 * velocity[n] + RATE * local * (g + decay * w)
            expected[n] = w - velocity[n]
    found = trained(lambda groups: LARS(groups, lr=RATE, momentum=0.9, trust_coefficient=trust))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


def test_lamb_is_the_papers():
    """You et al. 2020, algorithm 2."""
    expected, gradients = drawn()
    m, v = ([np.zeros(shape) for shape in SHAPES] for _ in range(2))
    for t, step in enumerate(gradients, start=1):
        for n, g in enumerate(step):
            w, decay = expected[n], DECAY if n < 2 else 0
            m[n] = 0.9 * m[n] + 0.1 * g
            v[n] = 0.999 * v[n] + 0.001 * g**2
            u = (m[n] / (1 - 0.9**t)) / (np.sqrt(v[n] / (1 - 0.999**t)) + 1e-6) + decay * w
            expected[n] = w - RATE * (norm(w) / norm(u) if n < 2 else 1) * u
    found = trained(lambda groups: LAMB(groups, lr=RATE))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10)


def test_lamb_without_trust_is_adamw():
    def lamb(groups):
        return LAMB([{**group, "trust": False} for group in groups], lr=0.01, eps=1e-8)

    def adamw(groups):
        return torch.optim.AdamW([{k: v for k, v in g.items() if k != "trust"} for g in groups], lr=0.01, eps=1e-8)

    for one, other in zip(trained(lamb, torch.float32), trained(adamw, torch.float32), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


def test_lars_without_trust_is_sgd_with_momentum():
    def lars(groups):
        return LARS([{**group, "trust": False} for group in groups], lr=0.01)

    def sgd(groups):
        return torch.optim.SGD([{k: v for k, v in g.items() if k != "trust"} for g in groups], lr=0.01, momentum=0.9)

    for one, other in zip(trained(lars), trained(sgd), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_zeros_move_and_do_not_become_nan(make):
    """A layer whose weights, or gradients, are all 0 has no ratio of norms."""
    still, empty = (nn.Parameter(torch.full((2, 3), value)) for value in (1.0, 0.0))
    optimizer = make([{"params": [still, empty]}], lr=0.5)
    still.grad, empty.grad = torch.zeros(2, 3), torch.ones(2, 3)
    optimizer.step()
    assert torch.equal(still, torch.ones(2, 3))
    assert bool((empty < 0).all())


@pytest.mark.parametrize("make", [LARS, LAMB])
def test_a_learning_rate_may_be_a_tensor(make):
    """As a recorded update has it."""
    with_numbers = trained(lambda groups: make(groups, lr=RATE))
    with_tensors = trained(lambda groups: make(groups, lr=torch.tensor(RATE, dtype=torch.float64)))
    for one, other in zip(with_numbers, with_tensors, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
