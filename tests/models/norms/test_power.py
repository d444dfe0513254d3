"""Power norm against numpy written from the paper."""

import numpy as np
import torch
from small_norms import EPS, MOMENTUM, X, make, number, scaled, wide


def test_power_norm_over_warm_up_and_after():
    """Shen et al. 2020, algorithm 2, forward and backward, step by step."""
    made = make("power")
    random = np.random.default_rng(3)
    square, nu, axes = np.ones(6), np.zeros(6), (0, 2, 3)
    for step in range(6):
        x, grad_y = random.normal(1.0, 2.0, size=X.shape), random.normal(size=X.shape)
        own = (x**2).mean(axes)
        psi = np.sqrt((own if step < 2 else square) + EPS)
        x_hat = x / wide(psi)
        tensor = torch.from_numpy(x).requires_grad_()
        y = made(tensor)
        np.testing.assert_allclose(number(y), scaled(x_hat, made), rtol=0, atol=1e-10)
        y.backward(torch.from_numpy(grad_y))
        grad = grad_y * wide(number(made.weight))
        product, gamma = (grad * x_hat).mean(axes), (x_hat**2).mean(axes)
        grad_x = (grad - wide(product if step < 2 else nu) * x_hat) / wide(psi)
        np.testing.assert_allclose(number(tensor.grad), grad_x, rtol=0, atol=1e-10)
        square = (1 - MOMENTUM) * square + MOMENTUM * own
        if step >= 2:
            nu = nu * (1 - MOMENTUM * gamma) + MOMENTUM * product
    np.testing.assert_allclose(made.running_nu, nu, rtol=0, atol=1e-10)
    evaluated = scaled(X / wide(np.sqrt(square + EPS)), made)
    np.testing.assert_allclose(number(made.eval()(torch.from_numpy(X))), evaluated, rtol=0, atol=1e-10)
