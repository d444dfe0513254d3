"""What `with_norm` leaves as it is, with its reason, and what it replaces where one might not think so."""

import pytest
import torch
from swapping import difference, learned, pair, rows, settings
from torch import nn
from torch.nn import functional as F

from models import with_norm
from models.norms.affine import ScaleAndShift
from models.norms.batch import BatchNorm
from models.norms.group import GroupNorm
from models.norms.instance import InstanceNorm
from models.norms.weight_standardization import (
    StandardizedConv2d,
)
from models.swap import BATCH_NORMS, NothingReplacedWarning


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


@pytest.mark.parametrize("network", [nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU()), nn.Sequential(nn.LayerNorm(3))])
def test_nothing_to_replace_is_a_warning(network):
    with pytest.warns(NothingReplacedWarning, match="with_norm has replaced nothing: the network has no batch norm"):
        swapped = with_norm(network, settings("group"))
    assert swapped.replaced == ()
