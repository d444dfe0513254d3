"""Standardized weights against numpy written from the paper."""

import numpy as np
import pytest
import torch
from small_norms import number

from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_weights_are_standardized(kind):
    """Qiao et al. 2019, equations 5 and 6."""
    norm = make_norm(ModelSettings(norm="weight_standardized_group"))
    made = (norm.conv(3, 4, 3) if kind == "conv" else norm.linear(27, 4)).double()
    weight = number(made.weight).reshape(4, 27)
    weight = (weight - weight.mean(1, keepdims=True)) / np.sqrt(weight.var(1, keepdims=True) + 1e-5)
    x = np.random.default_rng(4).normal(size=(2, 3, 3, 3) if kind == "conv" else (2, 27))
    want = x.reshape(2, 27) @ weight.T + number(made.bias)
    np.testing.assert_allclose(number(made(torch.from_numpy(x))).reshape(2, 4), want, rtol=0, atol=1e-10)
    x = torch.from_numpy(x).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()))
