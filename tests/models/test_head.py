"""Which layer is the head: by what is called, not by names or the order of making."""

import pytest
import torch
from small_networks import KINDS, make
from torch import nn

from models import build_model
from models.head import head_of, head_parameters
from models.networks.imagenet import IMAGENET_NETWORKS
from pipeline.config.model import ModelSettings


def blank(*shape):
    return torch.zeros(1, *shape, dtype=torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
def test_every_small_network_has_one(kind):
    model = make(kind)
    head = head_of(model, blank(3, 8, 8), 5)
    assert model.get_submodule(head).out_features == 5
    assert head_parameters(model, head) == {f"{head}.weight", f"{head}.bias"}


@pytest.mark.parametrize(
    ("network", "head"),
    [("resnet18", "fc"), ("mobilenet_v2", "classifier.1"), ("convnext_tiny", "classifier.2"),
     pytest.param("vgg11", "classifier.6", marks=pytest.mark.slow)],
)  # fmt: skip
def test_those_of_the_literature_have_torchvisions(network, head):
    assert network in IMAGENET_NETWORKS
    model = build_model(ModelSettings(network=network), image_shape=(3, 64, 64), num_classes=7)
    assert head_of(model, blank(3, 64, 64), 7) == f"1.{head}"


def test_ones_own_is_found_by_its_call_and_nothing_changes():
    model = build_model(ModelSettings(network="fine_tuned_net:build"), image_shape=(1, 8, 8), num_classes=4).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert head_of(model, blank(1, 8, 8), 4) == "1.out"
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_last_layer_of_another_kind_or_size_is_none():
    linear = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    assert head_of(linear, torch.zeros(1, 4), 3) == "1"
    assert head_of(linear, torch.zeros(1, 4), 2) is None
    assert head_of(nn.Sequential(linear, nn.PReLU()), torch.zeros(1, 4), 3) is None
    assert head_of(nn.Sequential(nn.Conv2d(1, 3, 1), nn.Flatten()), torch.zeros(1, 1, 1, 1), 3) == "0"


def test_a_parameter_that_the_head_shares_is_told_by_its_first_name():
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    network[3].weight = network[1].weight
    assert head_parameters(network, "3") == {"1.weight", "3.bias"}
