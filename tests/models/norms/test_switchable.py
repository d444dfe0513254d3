"""Switchable norm: evaluation, and precision in float32 and bf16."""

import numpy as np
import torch
from small_norms import MOMENTUM, X, make, number, switched


def test_switchable_norm_evaluates_with_running_statistics_of_the_batch():
    made = make("switchable")
    made(torch.from_numpy(X))
    mean, var = MOMENTUM * X.mean((0, 2, 3)), 1 - MOMENTUM + MOMENTUM * X.var((0, 2, 3))
    other = X[:2] + 1
    y = made.eval()(torch.from_numpy(other))
    np.testing.assert_allclose(number(y), switched(other, made, mean, var), rtol=0, atol=1e-10)


def far_from_zero(mean, std, dtype):
    """Rows of a large mean, and a float32 switchable norm with the float64 one that it should agree with."""
    layers = [make("switchable"), make("switchable").float()]
    x = torch.from_numpy(np.random.default_rng(5).normal(mean, std, size=(8, 6, 5, 3))).to(dtype)
    return x, layers[0](x.double()), layers[1], layers[0]


def test_switchable_norm_of_a_large_mean_in_float32():
    """A difference of mean square and squared mean would have no correct digit: 1e6 times 2^-24 is more than 0.01."""
    x, exact, made, reference = far_from_zero(1000, 0.1, torch.float32)
    y = made(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-3)  # x itself is exact to 3e-5 of a deviation of 0.1
    torch.testing.assert_close(made.running_var.double(), reference.running_var, rtol=1e-5, atol=0)
    torch.testing.assert_close(made.running_mean.double(), reference.running_mean, rtol=1e-6, atol=0)


def test_switchable_norm_in_bf16():
    x, exact, made, reference = far_from_zero(10, 0.5, torch.bfloat16)
    x.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-4)  # rounded once
    y.square().sum().backward()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(made.running_var.double(), reference.running_var, rtol=1e-5, atol=0)
