"""Networks of random structure: with batch norm of this package they are the same, without norms they evaluate as
before."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from models import NORMS, with_norm
from models.norms.base import NormLayer
from models.norms.weight_standardization import standardized
from pipeline.config.model import ModelSettings

pytestmark = pytest.mark.filterwarnings("ignore:with_norm has replaced nothing")

C = 4
CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM_KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class Residual(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        out = self.inner(x) * 1  # the gradient of a ReLU needs what it gave
        out += x
        return out


class Twice(Residual):
    """All layers are shared."""

    def forward(self, x):
        return self.inner(self.inner(x))


class Branching(Residual):
    """Has no one graph."""

    def forward(self, x):
        return self.inner(x) if x.sum() < 1e9 else x


class Modes(Residual):
    """Another graph in training."""

    def forward(self, x):
        return self.inner(x) if self.training else self.inner(x) * 2


class Leaking(nn.Module):
    """What the convolution gives is used twice."""

    def __init__(self, conv, norm):
        super().__init__()
        self.conv, self.norm = conv, norm

    def forward(self, x):
        y = self.conv(x)
        return torch.relu(self.norm(y)) + y


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(C))
        self.register_buffer("running_var", torch.ones(C))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, training=self.training)


def norms(dims):
    return st.builds(
        lambda affine, eps, momentum: NORM_KINDS[dims](C, affine=affine, eps=eps, momentum=momentum),
        st.booleans(),
        st.sampled_from([1e-5, 1e-3]),
        st.sampled_from([0.1, 0.5]),
    )


def convolutions(dims):
    plain = st.builds(
        lambda size, bias, groups: CONVOLUTIONS[dims](C, C, size, padding=size // 2, bias=bias, groups=groups),
        st.sampled_from([1, 3]),
        st.booleans(),
        st.sampled_from([1, 2]),
    )
    return plain | st.builds(lambda bias: TRANSPOSED[dims](C, C, 1, bias=bias, groups=2), st.booleans())


def chains(steps):
    return st.lists(steps, min_size=1, max_size=4).map(lambda layers: nn.Sequential(*layers))


def networks(dims):
    pairs = st.builds(nn.Sequential, convolutions(dims), norms(dims))
    simple = st.one_of(pairs, pairs, norms(dims), convolutions(dims), st.builds(nn.ReLU), st.builds(Functional))
    leaking = st.builds(Leaking, convolutions(dims), norms(dims))

    def nested(steps):
        kinds = st.sampled_from([Residual, Twice, Branching, Modes])
        return leaking | st.builds(lambda kind, inner: kind(inner), kinds, chains(steps))

    return chains(st.recursive(simple, nested, max_leaves=8))


@st.composite
def examples(draw):
    """A network with random numbers in float64, in evaluation, and a batch for it."""
    dims = draw(st.integers(1, 3))
    network = draw(networks(dims)).double()
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    for module in network.modules():
        for name, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if values.is_floating_point():
                drawn = torch.randn(values.shape, generator=generator, dtype=torch.float64)
                values.data.copy_(drawn.abs() + 0.5 if name == "running_var" else drawn)
    return network.eval(), torch.randn(3, C, *[4, 3, 2][:dims], generator=generator, dtype=torch.float64)


def close(one, other):
    return torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


def step(network, x):
    """Outputs in training, and the gradients of the parameters and, as ``""``, of the input."""
    network.train()
    x = x.clone().requires_grad_()
    y = network(x * 1)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return y, {"": x.grad, **{name: p.grad for name, p in network.named_parameters() if p.grad is not None}}


@settings(max_examples=40, deadline=None)
@given(examples())
def test_with_batch_norm_of_this_package_it_is_the_same_network(example):
    network, x = example
    swapped = with_norm(network, ModelSettings(norm="batch"))
    close(swapped.network(x), network(x))
    (expected, by), (found, gradients) = step(network, x), step(swapped.network, x)
    close(found, expected)
    scale = max(float(gradient.abs().max()) for gradient in by.values())
    for name, gradient in by.items():
        if name in gradients:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-9 * (1 + scale))
        else:  # the norm subtracts what the bias added
            assert name.removesuffix(".bias") in swapped.notes
            assert float(gradient.abs().max()) <= 1e-9 * (1 + scale)
    assert gradients.keys() <= by.keys()
    close(swapped.network.eval()(x), network.eval()(x))  # running statistics, too


@settings(max_examples=40, deadline=None)
@given(examples())
def test_without_norms_it_evaluates_as_before_and_trains(example):
    network, x = example
    swapped = with_norm(network, ModelSettings(norm="none"))
    close(swapped.network(x), network(x))
    given_names = {name for name, _ in network.named_parameters()}
    biases = {f"{name}.bias" for name in swapped.notes}
    assert {name for name, _ in swapped.network.named_parameters()} <= given_names | biases
    assert step(swapped.network, x)[0].isfinite().all()


@settings(max_examples=40, deadline=None)
@given(examples(), st.sampled_from(sorted(NORMS)), st.sampled_from(["learned", "fixed", "off"]))
def test_with_any_norm_it_runs_and_what_happened_is_said(example, norm, shift):
    network, x = example
    before = {name: values.clone() for name, values in network.state_dict().items()}
    own = ModelSettings(norm=norm, norm_groups=2, norm_shift=shift)
    swapped, again = with_norm(network, own), with_norm(network, own)
    assert swapped[1:] == again[1:]
    for one, other in zip(swapped.network.state_dict().items(), again.network.state_dict().items(), strict=True):
        assert one[0] == other[0]
        assert torch.equal(one[1], other[1])
    outputs, gradients = step(swapped.network, x)
    assert outputs.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    assert swapped.network.eval()(x).isfinite().all()
    assert all(torch.equal(before[name], values) for name, values in network.state_dict().items())
    theirs = {name for name, module in network.named_modules() if isinstance(module, tuple(NORM_KINDS.values()))}
    assert theirs == {name for name in (*swapped.replaced, *swapped.kept) if name in theirs}
    assert not set(swapped.replaced) & set(swapped.kept)
    modules = dict(swapped.network.named_modules())
    for name in theirs:
        assert isinstance(modules[name], (NormLayer, nn.Identity)) == (name in swapped.replaced)


def test_standardized_weights_are_those_of_the_formula_in_any_number_of_axes():
    for dims, kind in CONVOLUTIONS.items():
        network = nn.Sequential(kind(C, C, 2), NORM_KINDS[dims](C)).double()
        swapped = with_norm(network, ModelSettings(norm="weight_standardized_group", norm_groups=2)).network
        x = torch.randn(2, C, *[4] * dims, dtype=torch.float64)
        plain = kind(C, C, 2).double()
        with torch.no_grad():
            plain.weight.copy_(standardized(network[0].weight))
            plain.bias.copy_(network[0].bias)
            close(swapped[0](x), plain(x))
