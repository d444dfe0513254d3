"""Each norm against numpy written from its paper, and its gradient with gradcheck, in float64."""

import numpy as np
import pytest
import torch

from models.norms.registry import NORMS, make_norm
from pipeline.config.training import ModelSettings

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


def test_an_unknown_norm_lists_the_known():
    with pytest.raises(ValueError, match=r"model.norm 'bacth' is unknown; known are none, batch, batch_renorm, group"):
        make_norm(ModelSettings(norm="bacth"))


def test_groups_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"model.norm_groups 4 does not divide 6 channels"):
        make_norm(ModelSettings(norm="group", norm_groups=4, width=6)).layer(6)
