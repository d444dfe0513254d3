"""Weights taken up by name: with a new head, with other norms, and what does not fit."""

import pytest
import torch
from small_networks import make, settings_of
from torch import nn

from models import build_model
from models.head import head_of
from models.weights import take_weights, tensors_of
from pipeline.config.model import ModelSettings

SHAPE = (3, 32, 32)
OWN = "fine_tuned_net:build"


def build(norm="batch", classes=4, network="resnet18", shape=SHAPE, seed=0, **changes):
    settings = ModelSettings(network=network, norm=norm, norm_groups=2, **changes)
    return settings, build_model(settings, image_shape=shape, num_classes=classes, seed=seed)


def published(network="resnet18", classes=1000, norm="batch", shape=SHAPE, **changes):
    """A network that has learned something, and its state dict as torchvision publishes those of batch norm."""
    torch.manual_seed(5)
    _, model = build(norm, classes, network, shape, seed=7, **changes)
    with torch.no_grad():
        for name, value in model[1].state_dict().items():
            if name.endswith(("running_var", "weight")) and value.ndim == 1:
                value.uniform_(0.5, 2)
            elif value.ndim == 1:
                value.normal_(std=0.3)
    state = dict(model[1].state_dict())
    for name in [name for name in state if name.endswith("running_mean")]:
        state[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(90)
    return model, state


def take(settings, model, state, classes=4, shape=SHAPE):
    head = head_of(model, torch.zeros(1, *shape, dtype=torch.uint8), classes)
    return take_weights(
        model, settings, tensors_of(state), image_shape=shape, num_classes=classes, head=head.removeprefix("1.")
    )


@pytest.mark.parametrize("counted", [True, False])
def test_published_weights_with_a_new_head(counted):
    _, state = published()
    if not counted:
        state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    settings, model = build()
    drawn = model[1].fc.weight.clone()
    assert take(settings, model, state) == ("the head fc is new: 4 classes here, 1,000 in the file",)
    assert torch.equal(model[1].fc.weight, drawn)
    for name, value in model[1].state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, state[name]), name


def test_a_head_of_the_same_size_is_loaded_and_one_that_is_not_there_is_new():
    _, state = published(classes=4)
    settings, model = build()
    assert take(settings, model, state) == ()
    assert torch.equal(model[1].fc.bias, state["fc.bias"])
    trunk = {name: value for name, value in state.items() if not name.startswith("fc.")}
    assert take(settings, model, trunk) == ("the head fc is new: the file has none",)


def test_scale_and_shift_are_carried_into_another_norm():
    _, state = published()
    settings, model = build("group")
    notes = take(settings, model, state)
    assert notes[0].startswith("the head fc is new")
    assert notes[1] == "running statistics of 20 layers are left out: group keeps none"
    for name, value in model[1].state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, state[name]), name


@pytest.mark.parametrize("network", ["resnet18", "mobilenet_v2"])
def test_without_norm_the_convolutions_compute_what_they_did_together(network):
    source, state = published(network, classes=4)
    settings, model = build("none", network=network)
    notes = take(settings, model, state)
    assert any("it computes what it and" in note for note in notes)
    images = torch.randint(0, 256, (2, *SHAPE), dtype=torch.uint8)
    torch.testing.assert_close(model.double().eval()(images), source.double().eval()(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "norm", ["weight_standardized_group", "batch_renorm", "power", "instance", "layer", "switchable"]
)
def test_every_other_norm_takes_the_convolutions(norm):
    shape = (3, 48, 48)  # several positions everywhere
    _, state = published(shape=shape)
    settings, model = build(norm, shape=shape)
    take(settings, model, state, shape=shape)
    assert torch.equal(model[1].layer3[0].conv1.weight, state["layer3.0.conv1.weight"])
    assert torch.equal(model[1].layer3[0].bn1.weight, state["layer3.0.bn1.weight"])


def test_a_norm_without_a_shift_says_that_it_is_gone():
    _, state = published(classes=4)
    settings, model = build(norm_shift="off")
    notes = take(settings, model, state)
    assert any("model.norm_shift is off: its shift is gone" in note for note in notes)
    assert torch.equal(model[1].bn1.weight, state["bn1.weight"])
    assert torch.equal(model[1].bn1.running_var, state["bn1.running_var"])


def test_weights_without_statistics_begin_new_ones():
    _, state = published(norm="group", classes=4)
    settings, model = build()
    assert take(settings, model, state) == (
        "running statistics of 20 layers start at mean 0 and variance 1: the file has none",
    )
    assert torch.equal(model[1].bn1.weight, state["bn1.weight"])
    assert torch.equal(model[1].bn1.running_mean, torch.zeros(64))


@pytest.mark.parametrize(
    ("kind", "norm"),
    [*((kind, norm) for kind in ("cnn", "resnet", "bottleneck", "inception") for norm in ("group", "none")),
     ("wide_resnet", "group")],
)  # fmt: skip
def test_small_networks_of_batch_norm_become_others(kind, norm):
    """Those that sparknorm itself has trained."""
    source, settings, target = make(kind, seed=1), settings_of(kind, norm), make(kind, norm)
    take_weights(target, settings, tensors_of(source.state_dict()), image_shape=(3, 8, 8), num_classes=5, head=None)
    name = next(n for n, m in source[1].named_modules() if isinstance(m, nn.Linear))
    assert torch.equal(target[1].get_submodule(name).weight, source[1].get_submodule(name).weight)


def test_a_norm_that_follows_no_convolution_cannot_become_none():
    """Of a wide residual network they come first: nothing there can take up what they did."""
    source, settings, target = make("wide_resnet"), settings_of("wide_resnet", "none"), make("wide_resnet", "none")
    with pytest.raises(ValueError, match=r"with model\.norm none in the place of its batch norm, it does not fit"):
        take_weights(target, settings, tensors_of(source.state_dict()), image_shape=(3, 8, 8), num_classes=5, head=None)


@pytest.mark.parametrize("norm", ["keep", "batch", "group", "none"])
def test_ones_own_network_by_its_own_names(norm):
    """The file has the bias before batch norm, which ours, that subtracts it again, has not."""
    shape = (1, 8, 8)
    source, state = published(OWN, classes=9, norm="keep", shape=shape)
    settings, model = build(norm, 3, OWN, shape)
    assert "the head out is new: 3 classes here, 9 in the file" in take(settings, model, state, 3, shape)
    images = torch.randint(0, 256, (2, *shape), dtype=torch.uint8)
    if norm != "group":
        features, expected = (
            nn.Sequential(m[0], m[1].stem, m[1].stem10, m[1].bn).double().eval()(images) for m in (model, source)
        )
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def test_a_checkpoint_of_ones_own_with_swapped_norms_fits_again():
    shape = (1, 8, 8)
    _, trained = build("group", 3, OWN, shape, seed=3)
    settings, model = build("group", 3, OWN, shape)
    assert take(settings, model, {"model": trained.state_dict(), "progress": {}}, 3, shape) == ()
    assert all(torch.equal(value, model[1].state_dict()[name]) for name, value in trained[1].state_dict().items())


def test_wrappers_and_prefixes_are_taken_off():
    weights = {"a.weight": torch.ones(1)}
    assert tensors_of(weights) == tensors_of({"state_dict": {"module.a.weight": weights["a.weight"]}, "epoch": 3})
    assert tensors_of({"model": {"0.scale": torch.ones(1), "0.shift": torch.ones(1), "1.a.weight": torch.ones(1)}}) == {
        "a.weight": torch.ones(1)
    }


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        ([1], "it holds a list, and no tensors by name"),
        ({}, "it holds a dict, and no tensors by name"),
        ({"epoch": 3}, "it holds a int under 'epoch', and must hold tensors by name"),
    ],
)
def test_what_holds_no_tensors(loaded, message):
    with pytest.raises(ValueError, match=message):
        tensors_of(loaded)


def test_what_does_not_fit_is_named():
    _, state = published()
    settings, model = build()
    state["conv1.weight"] = torch.zeros(64, 1, 7, 7)
    state["layer9.weight"] = torch.zeros(3)
    del state["layer1.0.conv1.weight"], state["layer1.0.conv2.weight"]
    with pytest.raises(ValueError, match="does not fit the network, of whose 102 tensors it has 97: ") as raised:
        take(settings, model, state)
    text = str(raised.value)
    assert "1 have another shape: conv1.weight (64, 1, 7, 7) in the file, (64, 3, 7, 7) in the network" in text
    assert "2 are not in the file: layer1.0.conv1.weight (64, 64, 3, 3), layer1.0.conv2.weight" in text
    assert "1 are not in the network: layer9.weight (3,)" in text


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_weights_of_another_network_do_not_fit(norm):
    _, state = published("mobilenet_v2")
    settings, model = build(norm)
    with pytest.raises(ValueError, match=r"are not in the file: conv1\.weight \(64, 3, 7, 7\), .* and \d+ more"):
        take(settings, model, state)
