"""Batch renorm over its schedule, against numpy written from the paper, and its gradient."""

import numpy as np
import torch
from small_norms import EPS, MOMENTUM, X, make, number, scaled, standardized, wide


def test_batch_renorm_over_its_schedule():
    """Ioffe 2017, algorithm 1 and section 4.1, step by step."""
    made = make("batch_renorm", norm_r_max=1.5, norm_d_max=0.5)
    random = np.random.default_rng(2)
    mu, sigma = np.zeros(6), np.ones(6)
    clipped = 0
    for step in range(20):
        x = random.normal(0.1 * step, 1 + 0.2 * step, size=X.shape)
        mu_b, sigma_b = x.mean((0, 2, 3)), np.sqrt(x.var((0, 2, 3)) + EPS)
        r_max = 1 + 0.5 * np.clip((step - 2) / 14, 0, 1)
        d_max = 0.5 * np.clip((step - 2) / 8, 0, 1)
        r, d = np.clip(sigma_b / sigma, 1 / r_max, r_max), np.clip((mu_b - mu) / sigma, -d_max, d_max)
        clipped += (r != sigma_b / sigma).sum()
        x_hat = (x - wide(mu_b)) / wide(sigma_b) * wide(r) + wide(d)
        np.testing.assert_allclose(number(made(torch.from_numpy(x))), scaled(x_hat, made), rtol=0, atol=1e-10)
        mu, sigma = mu + MOMENTUM * (mu_b - mu), sigma + MOMENTUM * (sigma_b - sigma)
    assert 0 < clipped < 20 * 6
    evaluated = scaled((X - wide(mu)) / wide(sigma), made)
    np.testing.assert_allclose(number(made.eval()(torch.from_numpy(X))), evaluated, rtol=0, atol=1e-10)


def test_gradient_of_batch_renorm_with_some_channels_clipped():
    """r and d are constants to the gradient: each call sets the running statistics so that they stay what they are."""
    made = make("batch_renorm", norm_r_max=1.5, norm_d_max=0.5)
    made.steps.fill_(100)  # past the warm-up and both ramps
    r, d = np.array([0.5, 0.9, 1.2, 3.0, 1.1, 1.0]), np.array([0.1, -2.0, 0.2, 2.0, -0.3, 0.4])

    def call(x, *_):
        rows = number(x)
        running_std = np.sqrt(rows.var((0, 2, 3)) + EPS) / r
        made.running_std = torch.from_numpy(running_std)
        made.running_mean = torch.from_numpy(rows.mean((0, 2, 3)) - d * running_std)
        return made(x)

    rows = X[:3, :, :2, :2].copy()
    clipped = standardized(rows, (0, 2, 3)) * wide(r.clip(1 / 1.5, 1.5)) + wide(d.clip(-0.5, 0.5))
    x = torch.from_numpy(rows).requires_grad_()
    np.testing.assert_allclose(number(call(x)), scaled(clipped, made), rtol=0, atol=1e-10)
    torch.autograd.gradcheck(call, (x, *made.parameters()))
