"""Batch norm: running statistics, lanes, and synchronized over a world of one rank; numpy and gradcheck in float64."""

import numpy as np
import pytest
import torch
from small_norms import MOMENTUM, X, make, number, scaled, standardized


def test_running_statistics_take_the_unbiased_variance_and_torchs_momentum():
    made = make("batch")
    made(torch.from_numpy(X))
    np.testing.assert_allclose(made.running_mean, MOMENTUM * X.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(made.running_var, 1 - MOMENTUM + MOMENTUM * X.var((0, 2, 3), ddof=1), rtol=1e-10)


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_lanes_are_normalized_apart(lanes):
    made = make("batch", norm_statistics="lane")
    made.lanes = lanes
    y = made(torch.from_numpy(X))
    parts = X.reshape(lanes, -1, *X.shape[1:])
    each = np.concatenate([scaled(standardized(part, (0, 2, 3)), made) for part in parts])
    np.testing.assert_allclose(number(y), each, rtol=0, atol=1e-10)
    mean = np.mean([part.mean((0, 2, 3)) for part in parts], axis=0)
    var = np.mean([part.var((0, 2, 3), ddof=1) for part in parts], axis=0)
    np.testing.assert_allclose(made.running_mean, MOMENTUM * mean, rtol=1e-10)
    np.testing.assert_allclose(made.running_var, 1 - MOMENTUM + MOMENTUM * var, rtol=1e-10)
    x = torch.from_numpy(X[:, :, :2, :2].copy()).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()))


def test_lanes_that_do_not_divide_the_rows_are_named():
    made = make("batch", norm_statistics="lane")
    made.lanes = 3
    with pytest.raises(ValueError, match="3 lanes do not divide a batch of 4 rows"):
        made(torch.from_numpy(X))


def synchronized(**settings):
    """Batch norm over a world of one rank: the sum over ranks is the rank's own."""
    made = make("batch", norm_statistics="world", **settings)
    made.sum_over_ranks = lambda values: values
    return made


@pytest.mark.parametrize("shift", ["learned", "off"])
@pytest.mark.parametrize("scale", ["learned", "off"])
def test_gradient_of_synchronized_batch_norm(scale, shift):
    made = synchronized(norm_scale=scale, norm_shift=shift)
    x = torch.from_numpy(X[:3, :, :2, :2].copy()).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()))


@pytest.mark.parametrize("shift", ["learned", "fixed", "off"])
@pytest.mark.parametrize("scale", ["learned", "fixed", "off"])
def test_synchronized_batch_norm_of_bf16_rows_keeps_its_statistics_in_float32(scale, shift):
    """Values and gradients are those of float64, rounded to the 8 bits of bf16; of mean 10, bf16 holds 0.03."""
    reference, made = (synchronized(norm_scale=scale, norm_shift=shift) for _ in range(2))
    made.float()
    x, grad = (torch.from_numpy(np.random.default_rng(6).normal(m, 0.5, size=X.shape)).bfloat16() for m in (10, 0))
    found, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    y, want = made(found), reference(exact)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), want, rtol=2**-8, atol=1e-4)
    y.backward(grad)
    want.backward(grad.double())
    torch.testing.assert_close(found.grad.double(), exact.grad, rtol=2**-6, atol=0.02)
    torch.testing.assert_close(made.running_var.double(), reference.running_var, rtol=1e-5, atol=0)
