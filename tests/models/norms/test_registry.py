"""Each norm against numpy written from its paper, and its gradient with gradcheck, in float64."""

import numpy as np
import pytest
import torch
from small_norms import EPS, RUNNING, X, make, number, scaled, standardized, switched, wide

from models import NORMS
from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings


def expected(norm, made):
    """The output of a first training step."""
    if norm == "none":
        return X
    if norm in ("batch", "batch_renorm"):  # Ioffe & Szegedy 2015, algorithm 1; renorm begins with r = 1, d = 0
        return scaled(standardized(X, (0, 2, 3)), made)
    if norm == "layer":  # Ba et al. 2016, equation 3: over all of one sample
        return scaled(standardized(X, (1, 2, 3)), made)
    if norm == "instance":  # Ulyanov et al. 2016, equation 2: over the places of one channel of one sample
        return scaled(standardized(X, (2, 3)), made)
    if norm == "switchable":
        return switched(X, made, X.mean((0, 2, 3)), X.var((0, 2, 3)))
    if norm == "power":  # Shen et al. 2020, PN-V
        return scaled(X / np.sqrt((X**2).mean((0, 2, 3), keepdims=True) + EPS), made)
    grouped = X.reshape(4, 3, 2, 5, 3)  # Wu & He 2018, equation 7: over the channels of one group
    return scaled(standardized(grouped, (2, 3, 4)).reshape(X.shape), made)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_forward_is_the_papers(norm):
    made = make(norm)
    np.testing.assert_allclose(number(made(torch.from_numpy(X))), expected(norm, made), rtol=0, atol=1e-10)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_gradient(norm, training):
    """Power norm's is exact in its warm-up alone; `test_power_norm_over_warm_up_and_after` has the paper's."""
    made = make(norm).train(training)
    x = torch.from_numpy(X[:2, :, :2, :2].copy()).requires_grad_()
    before = dict(made.named_buffers())

    def call(x, *_):  # every call is the first: r and d of batch renorm are constants to the gradient
        for name, buffer in before.items():
            setattr(made, name, buffer.clone())
        return made(x)

    torch.autograd.gradcheck(call, (x, *made.parameters()))


@pytest.mark.parametrize("shift", ["learned", "fixed", "off"])
@pytest.mark.parametrize("scale", ["learned", "fixed", "off"])
@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"none"}))
def test_scale_and_shift_are_learned_fixed_or_off(norm, scale, shift):
    made = make(norm, norm_scale=scale, norm_shift=shift, norm_scale_init=0.5)
    learned = {name for name, _ in made.named_parameters()} & {"weight", "bias"}
    assert learned == {name for name, kind in (("weight", scale), ("bias", shift)) if kind == "learned"}
    assert (made.weight is None, made.bias is None) == (scale == "off", shift == "off")
    plain = make(norm)
    with torch.no_grad():
        for layer in (made, plain):
            for name, value in (("mean_weights", 0.0), ("var_weights", 0.0)):
                if hasattr(layer, name):
                    getattr(layer, name).fill_(value)
        plain.weight.fill_(1 if scale == "off" else 0.5)
        plain.bias.fill_(0)
        if scale == "learned":
            made.weight.fill_(0.5)
        if shift == "learned":
            made.bias.fill_(0)
    for _ in range(2):
        torch.testing.assert_close(made(torch.from_numpy(X)), plain(torch.from_numpy(X)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made.eval()(torch.from_numpy(X)), plain.eval()(torch.from_numpy(X)))


@pytest.mark.parametrize("norm", [n for n in RUNNING if n != "switchable"])
def test_evaluation_affine_is_what_the_layer_does_then(norm):
    made = make(norm)
    for _ in range(4):
        made(torch.from_numpy(X))
    factor, addend = (wide(number(values)) for values in made.eval().evaluation_affine())
    np.testing.assert_allclose(number(made(torch.from_numpy(X))), factor * X + addend, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", RUNNING)
def test_a_population_replaces_the_running_statistics(norm):
    made = make(norm)
    mean, var = torch.from_numpy(X.mean((0, 2, 3))), torch.from_numpy(X.var((0, 2, 3)))
    made.set_population(mean, var)
    centre, square = made.population()
    if norm == "power":
        mean, var = torch.zeros(6, dtype=torch.float64), var + mean**2
    torch.testing.assert_close(centre, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(square, var + EPS, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", [1, 5])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_tokens(norm, positions):
    """Sequences (N, T, D): as channels of N x T rows, or of N rows with T positions where the norm needs positions."""
    registered = make_norm(ModelSettings(norm=norm, norm_groups=3, width=6))
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    rows = x.transpose(1, 2) if registered.needs_positions else x.reshape(20, 6)
    want = registered.layer(6).double()(rows)
    want = want.transpose(1, 2) if registered.needs_positions else want.view(4, 5, 6)
    torch.testing.assert_close(registered.tokens(6).double()(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_at_positions(norm):
    """Group and layer norm over the channels at one position (Liu et al. 2022); the other norms as ever."""
    registered = make_norm(ModelSettings(norm=norm, norm_groups=3, norm_eps=EPS))
    made, x = registered.at_positions(6).double(), torch.from_numpy(X)
    if norm == "layer":
        want = standardized(X, (1,))
    elif norm in ("group", "weight_standardized_group"):
        want = standardized(X.reshape(4, 3, 2, 5, 3), (2,)).reshape(X.shape)
    else:
        want = number(registered.layer(6).double()(x))
    np.testing.assert_allclose(number(made(x)), want, rtol=0, atol=1e-10)
    other = registered.at_positions(6).double()(x.contiguous(memory_format=torch.channels_last))
    np.testing.assert_allclose(number(other), want, rtol=0, atol=1e-10)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_at_positions_dtypes_stay(norm):
    made, x = make_norm(ModelSettings(norm=norm, norm_groups=3)).at_positions(6), torch.from_numpy(X)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x.bfloat16()).dtype == torch.bfloat16
        assert made(x.float()).dtype == torch.float32


def test_groups_of_one_channel_at_positions_are_refused():
    with pytest.raises(
        ValueError, match=r"6 groups of 6 channels: one channel at one position is normalized to 0; use"
    ):
        make_norm(ModelSettings(norm="group", norm_groups=6)).at_positions(6)


@pytest.mark.parametrize("norm", ["group", "layer"])
def test_gradient_at_positions(norm):
    made = make_norm(ModelSettings(norm=norm, norm_groups=3)).at_positions(6).double()
    with torch.no_grad():
        made.weight.copy_(torch.arange(1, 7))
        made.bias.copy_(torch.arange(6))
    x = torch.from_numpy(X[:2, :, :2, :2].copy()).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: made(x), (x, *made.parameters()))


def test_an_unknown_norm_lists_the_known():
    with pytest.raises(ValueError, match=r"model.norm 'bacth' is unknown; known are none, batch, batch_renorm, group"):
        make_norm(ModelSettings(norm="bacth"))


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(
        ValueError, match=r"model.norm_groups 4 does not divide 6 channels; use .* every layer, such as 2$"
    ):
        make_norm(ModelSettings(norm="group", norm_groups=4, width=6)).layer(6)
