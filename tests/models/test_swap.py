"""Batch norm of any network gives way to any norm: what is equal afterwards, what is kept, and what is said."""

import pytest
import torch
from sklearn.datasets import load_digits
from small_networks import KINDS, make
from strangers_network import StrangersNet
from torch import nn
from torch.nn import functional as F
from torchvision_resnet import ResNet50

from models import NORMS, with_norm
from models.norms.affine import ScaleAndShift
from models.norms.base import NormLayer, RunningNorm
from models.norms.batch import BatchNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.group import GroupNorm
from models.norms.instance import InstanceNorm
from models.norms.power import PowerNorm
from models.norms.switchable import SwitchableNorm
from models.norms.weight_standardization import (
    StandardizedConv1d,
    StandardizedConv2d,
    StandardizedConv3d,
    StandardizedLinear,
)
from models.swap import BATCH_NORMS
from pipeline.config.model import ModelSettings

torch_norms = nn.modules.batchnorm._BatchNorm


def settings(norm, **changes):
    return ModelSettings(norm=norm, **{"norm_groups": 2, **changes})


def learned(network, seed=0):
    """In float64, with parameters and running statistics that no network starts with; it evaluates."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.double().modules():
        for name, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not values.is_floating_point():
                continue
            drawn = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            if name in ("running_var", "var"):
                drawn = drawn.abs() + 0.5
            values.data.copy_(drawn / values[0].numel() ** 0.5 if values.ndim > 1 else drawn)
    return network.eval()


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def difference(one, other, x):
    with torch.inference_mode():
        return float((one(x) - other(x)).abs().max())


def layers(network, *types):
    return [name for name, module in network.named_modules() if isinstance(module, types)]


def gradients(network, x):
    """Outputs in training, and the gradient of each parameter."""
    network.train()
    network.zero_grad()
    outputs = network(x)
    (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum().backward()
    return outputs.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def test_resnet50_with_batch_norm_of_this_package_is_the_same_network():
    torch.manual_seed(0)
    network = ResNet50(width=8, num_classes=7).double()
    x = rows(4, 3, 64, 64)
    for _ in range(3):
        network(rows(8, 3, 64, 64) + torch.randn(8, 3, 1, 1))  # running statistics
    swapped = with_norm(network, settings("batch"))
    assert (len(swapped.replaced), swapped.kept, swapped.notes) == (53, {}, {})
    assert layers(swapped.network, torch_norms) == []
    assert [name for name, _ in swapped.network.named_parameters()] == [name for name, _ in network.named_parameters()]
    assert difference(network.eval(), swapped.network.eval(), x) <= 1e-6
    expected, found = gradients(network, x), gradients(swapped.network, x)
    assert float((expected[0] - found[0]).abs().max()) <= 1e-6
    assert expected[1].keys() == found[1].keys()
    assert max(float((expected[1][name] - found[1][name]).abs().max()) for name in expected[1]) <= 1e-6
    # What training has made of the running statistics is the same, too.
    assert difference(network.eval(), swapped.network.eval(), x) <= 1e-6


def test_resnet50_without_norms_evaluates_as_it_did_with_them_and_has_biases():
    torch.manual_seed(0)
    network = ResNet50(width=8, num_classes=7).double()
    for _ in range(3):
        network(rows(8, 3, 64, 64))
    swapped = with_norm(network.eval(), settings("none"))
    assert layers(swapped.network, NormLayer, torch_norms) == []
    assert all(module.bias is not None for module in swapped.network.modules() if isinstance(module, nn.Conv2d))
    assert difference(network, swapped.network, rows(4, 3, 64, 64)) <= 1e-6


@pytest.mark.parametrize("norm", ["batch", "batch_renorm", "none"])
def test_a_strangers_network_evaluates_as_before(norm):
    network = learned(StrangersNet(width=8))
    swapped = with_norm(network, settings(norm))
    assert difference(network, swapped.network, rows(3, 3, 8, 8)) <= 1e-9
    assert swapped.kept == {"hand.batch_norm": "it is a call of a function, not a layer"}
    assert layers(swapped.network, torch_norms) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_networks_of_this_package_evaluate_as_before(kind, norm):
    network = learned(make(kind, "batch"))
    swapped = with_norm(network, settings(norm))
    x = torch.randint(0, 256, (3, 3, 8, 8), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    assert difference(network, swapped.network, x) <= 1e-9 * float(network(x).detach().abs().max())
    assert swapped.kept == {}
    assert layers(swapped.network, BatchNorm) == (layers(network, BatchNorm) if norm == "batch" else [])


def test_what_a_strangers_network_keeps_is_said():
    network = StrangersNet(width=16)
    function = {"hand.batch_norm": "it is a call of a function, not a layer"}
    swapped = with_norm(network, settings("group", norm_groups=8))
    assert swapped.kept == {
        "odd.1": "model.norm_groups 8 does not divide 20 channels",
        **function,
    }
    assert layers(swapped.network, torch_norms) == ["odd.1"]
    needs = "instance norm needs several positions of a channel, and may get one here"
    assert with_norm(network, settings("instance")).kept == {"se.fc.1": needs, "embed_bn": needs, **function}


def test_in_a_strangers_network_only_what_is_known_is_standardized():
    swapped = with_norm(StrangersNet(width=8), settings("weight_standardized_group"))
    convolutions = ("block1.conv1", "block1.conv2", "recurrence.conv", "odd.0", "block2.conv1", "block2.conv2")
    assert layers(swapped.network, StandardizedConv2d, StandardizedLinear) == [
        *("stem.0", *convolutions, "block2.shortcut.0", "se.fc.0", "embed")
    ]
    assert swapped.notes["branching.bn"] == (
        "the layer before it is not standardized: the calls within branching are not known: symbolically traced "
        "variables cannot be used as inputs to control flow"
    )
    assert swapped.notes["norm"] == (
        "the layer before it is not standardized: branching (Branching) has no standardized kind"
    )


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("norm", ["none", "batch", "group", "weight_standardized_group"])
def test_a_strangers_network_learns_digits_with_any_norm(norm, one_thread):
    digits = load_digits()
    x = torch.from_numpy(digits.images).float()[:512, None] / 8 - 1
    y = torch.from_numpy(digits.target)[:512]
    torch.manual_seed(0)
    network = with_norm(StrangersNet(in_channels=1, width=8), settings(norm, norm_groups=4)).network
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for batch in torch.arange(512).repeat(4).split(64):
        loss = F.cross_entropy(network(x[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    # 32 steps; 16 layers without norms learn slowly at first.
    assert sum(losses[-8:]) < (0.97 if norm == "none" else 0.75) * sum(losses[:8]), losses


def pair(*, bias=False, **options):
    return learned(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, **options)))


def norm_of(network):
    return network[1]


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"none"}))
def test_scale_shift_and_statistics_are_carried_over(norm):
    network = pair()
    old, new = norm_of(network), norm_of(with_norm(network, settings(norm)).network)
    assert torch.equal(new.weight, old.weight)
    assert torch.equal(new.bias, old.bias)
    if isinstance(new, PowerNorm):
        torch.testing.assert_close(new.running_square, old.running_var + old.running_mean**2)
    elif isinstance(new, BatchRenorm):
        torch.testing.assert_close(new.running_std, (old.running_var + old.eps).sqrt())
    elif isinstance(new, RunningNorm):
        assert torch.equal(new.running_var, old.running_var)
    if isinstance(new, RunningNorm) and not isinstance(new, PowerNorm):
        assert torch.equal(new.running_mean, old.running_mean)


@pytest.mark.parametrize("norm", sorted(NORMS))
def test_a_layer_keeps_dtype_device_mode_gradients_hooks_and_names(norm):
    network = pair().bfloat16()
    network[1].weight.requires_grad_(False)
    network.train()
    network[1].eval()  # a frozen batch norm
    seen = []
    network[1].register_forward_hook(lambda module, given, result: seen.append("forward"))
    network[1].register_forward_pre_hook(lambda module, given: seen.append("pre"))
    network[1].register_full_backward_hook(lambda module, given, result: seen.append("backward"))
    swapped = with_norm(network, settings(norm)).network
    assert seen == []  # a trace calls no hooks
    assert all(p.dtype == torch.bfloat16 for p in swapped.parameters())
    assert all(b.dtype in (torch.bfloat16, torch.int64) for b in swapped.buffers())
    assert swapped.training
    assert swapped[0].training
    assert not swapped[1].training
    if norm != "none":
        assert not swapped[1].weight.requires_grad
        assert swapped[1].bias.requires_grad
    assert swapped[0].weight.requires_grad
    swapped(torch.randn(2, 3, 5, 5).bfloat16()).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    names = {name for name, _ in swapped.named_parameters()}
    own = {"1.mean_weights", "1.var_weights"} if norm == "switchable" else set()
    assert names == ({"0.weight", "0.bias"} if norm == "none" else {"0.weight", "1.weight", "1.bias"} | own)
    moved = with_norm(network.to("meta"), settings(norm)).network
    assert {str(values.device) for values in [*moved.parameters(), *moved.buffers()]} == {"meta"}


def test_the_given_network_stays_as_it_is_and_results_repeat():
    network = learned(StrangersNet(width=8)).train()
    before = {name: values.clone() for name, values in network.state_dict().items()}
    kinds = [type(module) for module in network.modules()]
    state = torch.get_rng_state()
    for norm in NORMS:
        one, other = (with_norm(network, settings(norm)) for _ in range(2))
        assert one[1:] == other[1:]
        assert one.network.state_dict().keys() == other.network.state_dict().keys()
        for name, values in one.network.state_dict().items():
            assert torch.equal(values, other.network.state_dict()[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert [type(module) for module in network.modules()] == kinds
    assert all(torch.equal(before[name], values) for name, values in network.state_dict().items())
    assert all(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("norm", ["batch", "batch_renorm", "instance"])
def test_a_bias_that_the_norm_subtracts_goes_with_the_function_kept(norm):
    network = pair(bias=True)
    swapped = with_norm(network, settings(norm))
    assert swapped.notes == {"0": "its bias is gone: 1 subtracts the mean of each channel"}
    assert swapped.network[0].bias is None
    kept = nn.Sequential(network[0], norm_of(with_norm(nn.Sequential(nn.ReLU(), network[1]), settings(norm)).network))
    x = rows(4, 3, 6, 6)
    assert difference(kept.eval(), swapped.network.eval(), x) <= 1e-12
    assert difference(kept.train(), swapped.network.train(), x) <= 1e-12
    assert difference(kept.eval(), swapped.network.eval(), x) <= 1e-12


@pytest.mark.parametrize("norm", ["group", "layer", "power", "switchable"])
def test_a_bias_that_means_something_to_the_norm_stays(norm):
    network = pair(bias=True)
    swapped = with_norm(network, settings(norm))
    assert torch.equal(swapped.network[0].bias, network[0].bias)
    assert swapped.notes == {}


@pytest.mark.parametrize("norm", ["group", "layer", "power", "switchable", "weight_standardized_group"])
def test_a_norm_without_a_shift_leaves_it_to_the_bias_before(norm):
    network = pair()
    old = network[1]
    swapped = with_norm(network, settings(norm, norm_shift="off"))
    conv, new = swapped.network
    expected = old.bias * (old.running_var + old.eps).sqrt() - old.running_mean
    torch.testing.assert_close(conv.bias.detach(), expected.detach())
    assert conv.bias.requires_grad
    assert new.bias is None
    if isinstance(new, SwitchableNorm):  # its statistics are those of what the convolution gives now
        torch.testing.assert_close(new.running_mean, (old.running_mean + expected).detach())
    fixed = with_norm(network, settings(norm, norm_shift="fixed")).network
    assert torch.equal(fixed[0].bias, torch.zeros(4).double())
    assert torch.equal(fixed[1].bias, old.bias)
    assert not isinstance(fixed[1].bias, nn.Parameter)


def test_a_shift_that_is_lost_is_said():
    swapped = with_norm(pair(), settings("batch", norm_shift="off", norm_scale="off"))
    assert swapped.notes == {
        "1": "model.norm_scale is off: its scale is gone; model.norm_shift is off: its shift is gone"
    }


class Uses(nn.Module):
    """A convolution whose outputs, or weights, something else takes, too."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1, bias=how == "bias"), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        if how == "tied":
            self.twin = nn.Conv2d(3, 3, 1, bias=False)
            self.twin.weight = self.conv.weight

    def forward(self, x):
        y = self.conv(x)
        if self.how in ("outputs", "bias"):
            return self.norm(y) + y
        if self.how == "weights":
            return self.norm(y) + F.conv2d(x, self.conv.weight)
        if self.how == "two norms":
            return self.norm(y) + self.other(y)
        if self.how == "two layers":
            return self.norm(self.norm(y) + x)
        if self.how == "tied":
            return self.norm(y) + self.twin(x)
        return self.norm(F.relu(y))


USES = {
    "outputs": "what conv gives is used elsewhere, too",
    "bias": "what conv gives is used elsewhere, too",
    "weights": "the weights of conv are used elsewhere, too",
    "two norms": "what conv gives is used elsewhere, too",
    "two layers": "it follows a sum",
    "tied": "the weights of conv are used elsewhere, too",
    "relu": "it follows a call of relu",
}


@pytest.mark.parametrize("how", USES)
@pytest.mark.parametrize("norm", ["none", "batch"])
def test_a_layer_that_serves_others_stays_as_it_is(how, norm):
    network = learned(Uses(how))
    swapped = with_norm(network, settings(norm))
    assert difference(network, swapped.network, rows(2, 3, 4, 4)) <= 1e-12
    assert torch.equal(swapped.network.conv.weight, network.conv.weight)
    assert (swapped.network.conv.bias is None) == (how != "bias")
    if norm == "none":
        assert isinstance(swapped.network.norm, ScaleAndShift)
        assert swapped.notes["norm"] == f"a factor and an addend of each channel stay: {USES[how]}"
        assert swapped.network.norm.weight.requires_grad
        assert swapped.network.norm.bias.requires_grad


def test_two_norms_after_one_convolution_let_it_be_standardized_and_a_sum_does_not():
    for how, kind in (("two norms", StandardizedConv2d), ("outputs", nn.Conv2d)):
        swapped = with_norm(Uses(how), settings("weight_standardized_group", norm_groups=3))
        assert type(swapped.network.conv) is kind


def test_hooks_on_a_convolution_keep_it_as_it_is():
    network = pair()
    network[0].register_forward_hook(lambda module, given, result: result * 2)
    swapped = with_norm(network, settings("none"))
    assert isinstance(swapped.network[1], ScaleAndShift)
    assert difference(network, swapped.network, rows(2, 3, 5, 5)) <= 1e-12


class WithStatistics(nn.Module):
    """It borrows the numbers of a layer for a function."""

    def __init__(self, branch):
        super().__init__()
        self.bn, self.branch = nn.BatchNorm2d(3), branch

    def forward(self, x):
        if self.branch and x.sum() > 1e9:
            return x
        bn = self.bn
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, self.training)


@pytest.mark.parametrize("branch", [False, True])
def test_a_layer_whose_numbers_a_function_borrows_is_kept(branch):
    network = learned(nn.Sequential(WithStatistics(branch), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    swapped = with_norm(network, settings("group"))
    assert swapped.replaced == ("2",)
    assert swapped.kept == {
        "0.bn": "its parameters or statistics are used outside of it, too",
        "0.batch_norm": "it is a call of a function, not a layer",
    }
    swapped.network(rows(2, 3, 4, 4))


class Activated(nn.BatchNorm2d):
    def forward(self, x):
        return F.relu(super().forward(x))


class Renamed(nn.BatchNorm2d):
    pass


class Frozen(nn.Module):
    """Batch norm of numbers that do not change, as detection networks have it."""

    def __init__(self, channels):
        super().__init__()
        for name, values in {"weight": 2.0, "bias": 0.5, "running_mean": 0.25, "running_var": 4.0}.items():
            self.register_buffer(name, torch.full((channels,), values))

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale.view(1, -1, 1, 1) + (self.bias - self.running_mean * scale).view(1, -1, 1, 1)


def test_norms_that_are_not_to_be_replaced_are_kept_with_reasons():
    kinds = [Activated(4), Renamed(4), Frozen(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.BatchNorm2d(4)]
    nn.utils.parametrizations.weight_norm(kinds[-1], dim=None)
    swapped = with_norm(nn.Sequential(*kinds), settings("group"))
    assert swapped.replaced == ("1",)
    assert swapped.kept == {
        "0": "Activated is a BatchNorm2d with a forward pass of its own",
        "2": "Frozen is not one of the layers to replace",
        "3": "GroupNorm is not one of the layers to replace",
        "4": "LayerNorm is not one of the layers to replace",
        "5": "its parameters are computed by torch.nn.utils.parametrize",
    }


def test_other_layers_are_replaced_where_the_call_says_so():
    kinds = (Activated, Frozen, nn.GroupNorm, nn.InstanceNorm2d, nn.LayerNorm)
    network = nn.Sequential(Activated(4), Frozen(4), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4), nn.LayerNorm(4))
    swapped = with_norm(network.double(), settings("batch"), replace=(*BATCH_NORMS, *kinds))
    assert swapped.replaced == ("0", "1", "2", "3")
    assert swapped.kept == {"4": "LayerNorm normalizes the last axes, not channels at axis 1"}
    frozen = swapped.network[1]
    assert (frozen.weight[0], frozen.bias[0], frozen.running_mean[0]) == (2.0, 0.5, 0.25)
    assert not frozen.weight.requires_grad
    assert swapped.network[3].weight is None  # torch's instance norm has no scale by default
    assert swapped.notes == dict.fromkeys(
        ["2", "3"], "it had no running statistics: they start at mean 0 and variance 1"
    )


def test_ours_are_replaced_too():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm(4, eps=1e-2))
    swapped = with_norm(network, settings("group"))
    assert isinstance(swapped.network[1], GroupNorm)
    assert swapped.network[1].eps == 1e-2


def test_eps_and_momentum_of_a_layer_stay_unless_the_settings_say_others():
    network = pair(eps=1e-3, momentum=0.01)
    new = norm_of(with_norm(network, settings("batch")).network)
    assert (new.eps, new.momentum) == (1e-3, 0.01)
    new = norm_of(with_norm(network, settings("batch", norm_eps=1e-4, norm_momentum=0.2)).network)
    assert (new.eps, new.momentum) == (1e-4, 0.2)
    new = norm_of(with_norm(pair(momentum=None), settings("batch")).network)
    assert new.momentum == 0.1


def test_batch_norm_without_parameters_or_statistics():
    network = pair(affine=False)
    for norm in ("batch", "none"):
        swapped = with_norm(network, settings(norm)).network
        assert difference(network, swapped, rows(2, 3, 5, 5)) <= 1e-12
    assert list(dict(with_norm(network, settings("group")).network.named_parameters())) == ["0.weight"]
    alone = learned(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3, affine=False)))
    affine = with_norm(alone, settings("none")).network
    assert difference(alone, affine, rows(2, 3, 5, 5)) <= 1e-12
    assert list(affine.parameters()) == []  # what was not learned is not learned
    network = pair(track_running_stats=False)
    swapped = with_norm(network, settings("batch"))
    assert swapped.notes == {"1": "it had no running statistics: they start at mean 0 and variance 1"}
    assert difference(network.train(), swapped.network.train(), rows(2, 3, 5, 5)) <= 1e-12


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "norm_kind", "shape"),
    [
        (nn.Conv1d, nn.BatchNorm1d, (5,)),
        (nn.Conv2d, nn.BatchNorm2d, (5, 4)),
        (nn.Conv3d, nn.BatchNorm3d, (5, 4, 3)),
        (nn.ConvTranspose1d, nn.BatchNorm1d, (5,)),
        (nn.ConvTranspose2d, nn.BatchNorm2d, (5, 4)),
        (nn.ConvTranspose3d, nn.BatchNorm3d, (5, 4, 3)),
        (nn.Linear, nn.BatchNorm1d, ()),
    ],
)
def test_layers_of_all_kinds_take_up_what_batch_norm_did(kind, norm_kind, shape, groups, bias):
    options = {} if kind is nn.Linear else {"kernel_size": 2, "groups": groups}
    network = learned(nn.Sequential(kind(4, 6, bias=bias, **options), norm_kind(6)))
    x = rows(3, 4, *shape)
    for norm in ("none", "batch"):
        swapped = with_norm(network, settings(norm))
        assert difference(network, swapped.network, x) <= 1e-12
        assert all(p.dtype == torch.float64 for p in swapped.network.parameters())
    assert type(with_norm(network, settings("none")).network[1]) is nn.Identity
    standardized = with_norm(network, settings("weight_standardized_group"))
    known = (StandardizedConv1d, StandardizedConv2d, StandardizedConv3d, StandardizedLinear)
    assert isinstance(standardized.network[0], known) == (
        kind not in (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    )
    assert standardized.network(x).shape == network(x).shape


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("shape", [(4,), (4, 5), (4, 5, 3), (4, 5, 3, 2)])
def test_every_norm_takes_vectors_sequences_images_and_volumes(norm, shape):
    """Vectors excepted where a norm needs several positions of a channel."""
    kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}[len(shape)]
    network = learned(nn.Sequential(kind(4)))
    x = rows(3, *shape).requires_grad_()
    swapped = with_norm(network, settings(norm), inputs=x)
    if norm in ("instance", "switchable") and len(shape) == 1:
        assert list(swapped.kept) == ["0"]
        return
    assert (swapped.replaced, swapped.kept) == (("0",), {})
    for training in (True, False):
        y = swapped.network.train(training)(x)
        y.square().sum().backward()
        assert y.shape == x.shape
        assert y.isfinite().all()
        assert x.grad.isfinite().all()


def test_inputs_tell_how_many_positions_there_are():
    flat = nn.Sequential(nn.Conv2d(3, 4, 5), nn.BatchNorm2d(4))  # one position of 5 x 5 pixels, four of 6 x 6
    assert with_norm(flat, settings("instance")).replaced == ("1",)
    assert with_norm(flat, settings("instance"), inputs=torch.randn(2, 3, 5, 5)).replaced == ()
    assert with_norm(flat, settings("instance"), inputs=torch.randn(2, 3, 6, 6)).replaced == ("1",)
    sequence = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(4))  # of (N, 4, 5)
    assert with_norm(sequence, settings("instance")).replaced == ()
    assert with_norm(sequence, settings("instance"), inputs=torch.randn(2, 4, 5)).replaced == ("1",)
    with pytest.raises(ValueError, match=r"^the network does not take inputs of shape \(2, 1, 5, 5\): "):
        with_norm(flat, settings("instance"), inputs=torch.randn(2, 1, 5, 5))


def test_groups_of_one_channel_need_positions_as_instance_norm_does():
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert with_norm(network, settings("group", norm_groups=2)).kept == {}
    reason = "group norm needs several positions of a channel, and may get one here"  # else every output is the shift
    assert with_norm(network, settings("group", norm_groups=4)).kept == {"1": reason}
    assert with_norm(pair(), settings("group", norm_groups=4)).kept == {}


def test_a_linear_layer_whose_outputs_are_not_the_channels_is_left_alone():
    network = learned(nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)))  # of (N, 4, 5): 4 by 4, but not the same 4
    x = rows(3, 4, 5)
    swapped = with_norm(network, settings("none"), inputs=x)
    assert isinstance(swapped.network[1], ScaleAndShift)
    assert difference(network, swapped.network, x) <= 1e-12


def test_a_norm_alone_is_replaced_itself():
    network = learned(nn.BatchNorm2d(4))
    swapped = with_norm(network, settings("batch"))
    assert (type(swapped.network), swapped.replaced, swapped.kept) == (BatchNorm, ("",), {})
    assert difference(network, swapped.network, rows(2, 4, 3, 3)) <= 1e-12


class OverTokens(nn.Module):
    def __init__(self, features):
        super().__init__()
        self.bn = nn.BatchNorm1d(features)

    def forward(self, x_ntd):
        return self.bn(x_ntd.transpose(1, 2)).transpose(1, 2)


def test_layers_within_a_layer_of_torchs_own():
    """A transformer's layer with batch norm, which torch does not trace into."""

    layer = nn.TransformerEncoderLayer(4, 2, 8, activation=F.silu, batch_first=True)
    layer.norm1, layer.norm2 = OverTokens(4), OverTokens(4)
    network = learned(nn.Sequential(nn.Linear(4, 4), layer))
    x = rows(2, 3, 4)
    for norm in ("batch", "none", "group"):
        swapped = with_norm(network, settings(norm))
        assert swapped.replaced == ("1.norm1.bn", "1.norm2.bn")
        if norm != "group":
            assert difference(network, swapped.network, x) <= 1e-9


def test_a_layer_with_two_names_is_one_layer():
    conv, bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    network = nn.Sequential(nn.Sequential(conv, bn), nn.Sequential(conv, bn))
    swapped = with_norm(learned(network), settings("group", norm_groups=3))
    assert swapped.replaced == ("0.1",)
    assert swapped.network[0][1] is swapped.network[1][1]
    assert isinstance(swapped.network[1][1], GroupNorm)


def test_instance_norm_takes_the_place_in_an_image_network():
    swapped = with_norm(pair(), settings("instance"))
    assert isinstance(swapped.network[1], InstanceNorm)


def test_a_network_that_cannot_be_copied_is_refused():
    lazy = nn.Sequential(nn.LazyConv2d(4, 1), nn.LazyBatchNorm2d())
    with pytest.raises(ValueError, match=r"^0, 1 do not know their sizes yet: give the network a batch first$"):
        with_norm(lazy, settings("group"))
    lazy(torch.randn(2, 3, 4, 4))
    assert with_norm(lazy, settings("group")).replaced == ("1",)
    odd = pair()
    odd.saved = odd[0].weight * 2  # no parameter, and part of a graph
    with pytest.raises(
        ValueError, match=r"^the network cannot be copied: Only Tensors created explicitly by the user "
    ):
        with_norm(odd, settings("group"))


def test_an_unknown_norm_lists_those_that_are_known():
    with pytest.raises(ValueError, match=r"model.norm 'bach' is unknown; known are none, batch, "):
        with_norm(pair(), settings("bach"))
