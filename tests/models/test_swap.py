"""Batch norm of whole networks gives way to any norm: what is equal afterwards, what is kept, and what learns."""

import pytest
import torch
from sklearn.datasets import load_digits
from small_networks import KINDS, make
from strangers_network import StrangersNet
from swapping import difference, gradients, layers, learned, rows, settings, torch_norms
from torch import nn
from torch.nn import functional as F
from torchvision_resnet import ResNet50

from models import with_norm
from models.norms.base import NormLayer
from models.norms.batch import BatchNorm
from models.norms.weight_standardization import (
    StandardizedConv2d,
    StandardizedLinear,
)


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
