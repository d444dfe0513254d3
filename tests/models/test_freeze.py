"""Frozen parts: their parameters and running statistics stay, whatever mode the network is in."""

import copy

import pytest
import torch
from torch import nn

from models import build_model
from models.freeze import Frozen, freeze
from pipeline.config.model import ModelSettings
from pipeline.training import norm_statistics


def network(norm="batch"):
    settings = ModelSettings(network="fine_tuned_net:build", norm=norm, norm_groups=2)
    return build_model(settings, image_shape=(1, 8, 8), num_classes=3)


@pytest.mark.parametrize("norm", ["batch", "keep", "batch_renorm", "power", "switchable", "group", "none"])
def test_a_frozen_part_stays_as_it_is(norm):
    torch.manual_seed(0)
    model = network(norm)
    freeze(model[1], ["stem"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    copied = copy.deepcopy(model)
    for each in (model, copied):
        optimizer = torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1)
        each.train()
        each(torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)).square().sum().backward()
        optimizer.step()
        after = each.state_dict()
        moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
        assert not any(name.startswith("1.stem.") for name in moved)
        assert {"1.stem10.weight", "1.out.weight"} <= moved
    assert not any(name.startswith("1.stem.") for name in norm_statistics.layers(model))
    if norm in ("batch", "keep"):
        assert "1.bn" in norm_statistics.layers(model)
        assert "1.bn.running_mean" in moved


def test_frozen_batch_norm_normalizes_with_its_running_statistics_in_training():
    model = network()
    model[1].stem[1].running_mean.fill_(3.0)
    freeze(model[1], ["stem"])
    images = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    stem = nn.Sequential(model[0], model[1].stem)
    torch.testing.assert_close(stem.train()(images), stem.eval()(images), rtol=0, atol=0)
    assert isinstance(model[1].stem[1], Frozen)
    assert model[1].bn.train().training
    assert not model.train()[1].stem[1].training


def test_names_are_whole():
    """``stem`` is no part of ``stem10``, and one parameter may be named."""
    model = network()
    freeze(model[1], ["stem", "neck.bias"])
    frozen = {name for name, parameter in model[1].named_parameters() if not parameter.requires_grad}
    assert frozen == {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias", "neck.bias"} & {
        name for name, _ in model[1].named_parameters()
    }
    assert "stem10.weight" not in frozen


@pytest.mark.parametrize(
    ("prefixes", "message"),
    [
        (["stem", "layer4"], r"model\.freeze: the network has no 'layer4'; its parts are out, stem, stem10, bn, neck"),
        (["stm"], r"model\.freeze: the network has no 'stm'; did you mean stem\?"),
        (["out", "stem", "stem10", "bn", "neck"], r"model\.freeze leaves nothing to train"),
    ],
)
def test_a_name_that_is_none_or_nothing_left(prefixes, message):
    with pytest.raises(ValueError, match=message):
        freeze(network()[1], prefixes)
