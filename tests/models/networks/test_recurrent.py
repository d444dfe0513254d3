"""The recurrent network: its cells against torch's own and against numpy written from the papers, in float64."""

import numpy as np
import pytest
import torch
from small_networks import make, number, randomized
from torch import nn

from models.networks.recurrent import GRU, LSTM
from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings


@pytest.mark.parametrize(("cell", "kind"), [(nn.LSTM, LSTM), (nn.GRU, GRU)])
def test_cells_without_norm_are_torchs(cell, kind):
    settings = ModelSettings(norm="none", width=5)
    ours = randomized(kind(3, 7, make_norm(settings), settings))
    theirs = cell(3, 5, batch_first=True).double()
    for name, layer in (("ih", ours.input), ("hh", ours.hidden)):
        theirs.get_parameter(f"weight_{name}_l0").data.copy_(layer.weight)
        theirs.get_parameter(f"bias_{name}_l0").data.copy_(layer.bias)
    if kind is LSTM:
        theirs.bias_ih_l0.data[5:10] += 1  # the forget gate's
    x = torch.randn(4, 7, 3, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x)[0], rtol=0, atol=1e-10)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm_in_numpy(layer, x_ntd, normalize):
    """Ba et al. 2016, equations 20 to 22, and Cooijmans et al. 2016, equations 6 to 8."""
    h = c = np.zeros((len(x_ntd), 5))
    for t in range(x_ntd.shape[1]):
        new = normalize(layer.input_norms[0], x_ntd[:, t] @ number(layer.input.weight).T, t)
        old = normalize(layer.hidden_norms[0], h @ number(layer.hidden.weight).T, t)
        i, f, g, o = np.split(new + old, 4, axis=1)
        c = sigmoid(f + 1) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(normalize(layer.cell_norm, c, t))
    return h


def gru_in_numpy(layer, x_ntd, normalize):
    h = np.zeros((len(x_ntd), 5))
    for t in range(x_ntd.shape[1]):
        new = np.split(x_ntd[:, t] @ number(layer.input.weight).T, [10], axis=1)
        old = np.split(h @ number(layer.hidden.weight).T, [10], axis=1)
        new = [normalize(norm, part, t) for norm, part in zip(layer.input_norms, new, strict=True)]
        old = [normalize(norm, part, t) for norm, part in zip(layer.hidden_norms, old, strict=True)]
        r, z = np.split(sigmoid(new[0] + old[0]), 2, axis=1)
        h = (1 - z) * np.tanh(new[1] + r * old[1]) + z * h
    return h


class LayerNorm:
    """Ba et al. 2016, equation 4: the same at every step, and in evaluation."""

    def __call__(self, norm, x, step):
        layer = norm.layers[0]
        normal = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5)
        return normal * number(layer.weight) + number(layer.bias)


class RecurrentBatchNorm:
    """Statistics of each step by themselves, torch's momentum of 0.1; scale and shift of all steps."""

    def __init__(self):
        self.running, self.training = {}, True

    def __call__(self, norm, x, step):
        mean, var = self.running.get((norm, step), (0.0, 1.0))
        if self.training:
            self.running[norm, step] = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0, ddof=1)
            mean, var = x.mean(0), x.var(0)
        affine = norm.scale_and_shift
        return (x - mean) / np.sqrt(var + 1e-5) * number(affine.weight) + number(affine.bias)


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize(("kind", "in_numpy"), [(LSTM, lstm_in_numpy), (GRU, gru_in_numpy)])
def test_normalized_cells_are_the_papers(kind, in_numpy, norm):
    settings = ModelSettings(norm=norm, width=5)
    layer = randomized(kind(3, 7, make_norm(settings), settings))
    normalize = LayerNorm() if norm == "layer" else RecurrentBatchNorm()
    x = np.random.default_rng(1).normal(size=(6, 7, 3))
    for training in (True, True, False):
        layer.train(training)
        normalize.training = training
        hidden = number(layer(torch.from_numpy(x)))[:, -1]
        np.testing.assert_allclose(hidden, in_numpy(layer, x, normalize), rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
@pytest.mark.parametrize("kind", [LSTM, GRU])
def test_gradient_of_the_cells(kind, norm):
    settings = ModelSettings(norm=norm, width=3)
    layer = randomized(kind(2, 3, make_norm(settings), settings))
    x = torch.from_numpy(np.random.default_rng(2).normal(size=(4, 3, 2))).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *layer.parameters()))


def test_scale_and_shift_of_recurrent_batch_norm():
    def affine(**changes):
        return make("recurrent", **changes)[1].layers[0].cell_norm.scale_and_shift

    assert torch.equal(affine().weight, torch.full((8,), 0.1))
    assert torch.equal(affine(norm_scale_init=5.0).weight, torch.full((8,), 0.5))
    assert affine(norm_scale="off").weight is None
    assert dict(affine(norm_scale="fixed", norm_shift="off").named_parameters()) == {}
    assert affine(norm_shift="off").bias is None


@pytest.mark.parametrize("kind", ["recurrent", "gru"])
def test_norms_over_positions_normalize_the_inputs_over_time(kind):
    layer = make(kind, "instance")[1].layers[0]
    seen = []
    layer.over_time[0].register_forward_hook(lambda *args: seen.append(args[2]))
    layer(torch.randn(4, 8, 24))
    torch.testing.assert_close(seen[0].mean(1), torch.zeros(4, layer.sizes[0]), atol=1e-5, rtol=0)
    assert layer.hidden.bias is not None


def test_hidden_to_hidden_weights_are_orthogonal():
    for kind in ("recurrent", "gru"):
        for square in make(kind)[1].layers[0].hidden.weight.split(8):
            torch.testing.assert_close(square @ square.T, torch.eye(8))
