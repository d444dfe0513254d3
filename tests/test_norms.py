"""Each norm against numpy written from its paper, and its gradient with gradcheck."""

import numpy as np
import pytest
import torch

from models.norms import NORMS, make_norm
from pipeline.config import ModelSettings

EPS = 1e-3
X = np.random.default_rng(0).normal(2.0, 3.0, size=(4, 6, 5, 3))


def layer(norm):
    made = make_norm(ModelSettings(norm=norm, norm_groups=3, norm_eps=EPS, norm_momentum=0.25, width=6)).layer(6)
    made = made.double()
    random = np.random.default_rng(1)
    for parameter in made.parameters():
        parameter.data.copy_(torch.from_numpy(random.normal(size=parameter.shape)))
    return made


def standardized(x, axes):
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + EPS)


def scaled(x, made):
    weight, bias = (p.detach().numpy().reshape(1, -1, 1, 1) for p in (made.weight, made.bias))
    return x * weight + bias


def expected(norm, made):
    if norm == "none":
        return X
    if norm == "batch":  # Ioffe & Szegedy 2015, algorithm 1: over batch and places
        return scaled(standardized(X, (0, 2, 3)), made)
    if norm == "layer":  # Ba et al. 2016, equation 3: over all of one sample
        return scaled(standardized(X, (1, 2, 3)), made)
    grouped = X.reshape(4, 3, 2, 5, 3)  # Wu & He 2018, equation 7: over the channels of one group
    return scaled(standardized(grouped, (2, 3, 4)).reshape(X.shape), made)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_forward_is_the_papers(norm):
    made = layer(norm)
    np.testing.assert_allclose(made(torch.from_numpy(X)).detach().numpy(), expected(norm, made), atol=1e-10)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_gradient(norm):
    made = layer(norm)
    x = torch.from_numpy(X[:2, :, :2, :2].copy()).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()))


def test_running_statistics_take_the_unbiased_variance_and_torchs_momentum():
    made = layer("batch")
    made(torch.from_numpy(X))
    np.testing.assert_allclose(made.running_mean, 0.25 * X.mean((0, 2, 3)), rtol=1e-10)
    np.testing.assert_allclose(made.running_var, 0.75 + 0.25 * X.var((0, 2, 3), ddof=1), rtol=1e-10)


def test_an_unknown_norm_lists_the_known():
    with pytest.raises(ValueError, match=r"model.norm 'bacth' is unknown; known are none, batch, group, layer"):
        make_norm(ModelSettings(norm="bacth"))


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"model.norm_groups 4 does not divide 6 channels"):
        make_norm(ModelSettings(norm="group", norm_groups=4, width=6)).layer(6)
