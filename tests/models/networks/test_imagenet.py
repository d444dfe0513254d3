"""The networks for ImageNet: published names and shapes, with every norm, their initial weights, what is refused."""

import math
from pathlib import Path

import pytest
import torch
from small_imagenet import CLASSES, NARROW, images, make, outline, perturbed
from torch import nn

from models import NETWORKS, NORMS, build_model
from models.networks.imagenet import IMAGENET_NETWORKS
from models.networks.imagenet.convnext import Block
from models.networks.imagenet.layers import AdaptivePool, StochasticDepth
from models.networks.imagenet.mobilenet import InvertedResidual
from models.networks.imagenet.resnet import BasicBlock, Bottleneck
from pipeline.config.model import ModelSettings

PUBLISHED = Path(__file__).parent / "published"
# As torchvision publishes them, with 1,000 classes: weight file, network, norm, number of parameters.
COUNTS = [
    ("resnet18", "resnet18", "batch", 11_689_512),
    ("resnet34", "resnet34", "batch", 21_797_672),
    ("resnet50", "resnet50", "batch", 25_557_032),
    ("resnet101", "resnet101", "batch", 44_549_160),
    ("vgg11", "vgg11", "none", 132_863_336),
    ("vgg13", "vgg13", "none", 133_047_848),
    ("vgg16", "vgg16", "none", 138_357_544),
    ("vgg19", "vgg19", "none", 143_667_240),
    ("vgg11_bn", "vgg11", "batch", 132_868_840),
    ("vgg13_bn", "vgg13", "batch", 133_053_736),
    ("vgg16_bn", "vgg16", "batch", 138_365_992),
    ("vgg19_bn", "vgg19", "batch", 143_678_248),
    ("mobilenet_v2", "mobilenet_v2", "batch", 3_504_872),
    ("convnext_tiny", "convnext_tiny", "layer", 28_589_128),
]
LISTED = [row for row in COUNTS if (PUBLISHED / f"{row[0]}.txt").is_file()]


def published(file):
    """The names and shapes of a weight file, in its order."""
    rows = (line.split() for line in (PUBLISHED / f"{file}.txt").read_text().splitlines())
    return {name: () if shape == "scalar" else tuple(map(int, shape.split("x"))) for name, shape in rows}


@pytest.mark.parametrize(("file", "network", "norm", "count"), COUNTS)
def test_numbers_of_parameters_are_the_published(file, network, norm, count):
    assert sum(p.numel() for p in outline(network, norm).parameters()) == count


def test_every_network_has_its_published_number_here_and_three_files_their_list():
    assert {network for _, network, _, _ in COUNTS} == set(IMAGENET_NETWORKS)
    assert {file for file, *_ in LISTED} >= {"resnet50", "vgg16", "vgg16_bn"}


@pytest.mark.parametrize(("file", "network", "norm", "count"), LISTED)
def test_names_and_shapes_are_the_published_and_such_a_file_loads(file, network, norm, count):
    """Published files have a count of batches for each batch norm, which is left out of account."""
    listed = published(file)
    model = outline(network, norm)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert sum(math.prod(shape) for shape in parameters.values()) == count
    expected = [name for name in listed if name.split(".")[-1] in ("weight", "bias", "layer_scale")]
    assert parameters == {name: listed[name] for name in expected}
    assert list(parameters) == expected
    state = {name: torch.empty(shape, device="meta") for name, shape in listed.items()}
    assert set(state) - set(model.state_dict()) == {name for name in state if "num_batches_tracked" in name}
    model.load_state_dict(state, strict=True)
    assert "num_batches_tracked" in " ".join(state) or norm != "batch"  # the caller's mapping is as it was
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "other.num_batches_tracked"'):
        model.load_state_dict({**state, "other.num_batches_tracked": torch.tensor(0)})


def test_a_file_of_resnet50_reaches_the_network_that_build_model_makes():
    random = torch.Generator().manual_seed(0)
    state = {name: torch.rand(shape, generator=random) for name, shape in published("resnet50").items()}
    model = build_model(ModelSettings(network="resnet50"), image_shape=(3, 224, 224), num_classes=1000)
    model[1].load_state_dict(state, strict=True)
    for name, values in model[1].state_dict().items():
        assert torch.equal(values, state[name]), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", IMAGENET_NETWORKS)
def test_every_network_can_be_made_with_every_norm(network, norm):
    model = outline(network, norm, num_classes=7)
    *_, last = (m for m in model.modules() if isinstance(m, nn.Linear))
    assert last.out_features == 7


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("kind", NARROW)
def test_every_kind_with_every_norm_trains(kind, norm):
    model, x, labels = make(kind, norm), images(6), torch.arange(6) % CLASSES
    before = {name: values.clone() for name, values in model.named_parameters()}
    for module in model.modules():  # for the loss to go down at every step; for dropout there are other tests
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, StochasticDepth):
            module.probability = 0.0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001)  # without norms more is too much
    losses = []
    for _ in range(3):
        loss = nn.functional.cross_entropy(model(x), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not torch.equal(
        before["1." + first_convolution(model)], model.get_parameter("1." + first_convolution(model))
    )
    logits = model.eval()(x)
    other = make(kind, norm, seed=1).eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), logits)
    assert logits.std(0).max() > 1e-4  # images are told apart


@pytest.mark.parametrize(("kind", "norm"), [*((kind, "batch") for kind in NARROW), ("convnext", "layer")])
def test_channels_last_bf16_and_any_batch(kind, norm):
    model, x = perturbed(make(kind, norm)), images(3)
    logits = model(x)
    torch.testing.assert_close(torch.cat([model(row[None]) for row in x]), logits, rtol=1e-4, atol=1e-4)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x.contiguous(memory_format=torch.channels_last)), logits, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        nn.functional.cross_entropy(model.train()(x), torch.arange(3)).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def first_convolution(model):
    return next(name for name, _ in model[1].named_parameters())


@pytest.mark.parametrize("kind", NARROW)
def test_arms_start_from_the_same_shared_weights(kind):
    """In the order of the layers: in the VGG networks names follow from what is between."""

    def drawn(norm, **changes):
        parameters = make(kind, norm, **changes).named_parameters()
        return [p for name, p in parameters if p.ndim > 1 and "layer_scale" not in name]

    reference = drawn("none")
    for norm in set(NORMS) - {"none"}:
        other = drawn(norm)
        assert len(other) == len(reference)
        assert all(torch.equal(one, two) for one, two in zip(reference, other, strict=True))
    scaled = drawn("none", init_scale=0.25)
    assert all(torch.equal(one * 0.25, two) for one, two in zip(reference, scaled, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(reference, drawn("none", seed=1), strict=True))


@pytest.mark.parametrize("kind", NARROW)
def test_biases_of_convolutions(kind):
    """Residual networks as norms need them; the others always, as published."""

    def with_bias(norm, **changes):
        layers = make(kind, norm, **changes).modules()
        return {m.bias is not None for m in layers if isinstance(m, nn.Conv2d)}

    always = {True}
    assert with_bias("none") == with_bias("layer", norm_shift="off") == always
    assert with_bias("batch") == with_bias("layer") == (always if kind in ("vgg", "convnext") else {False})


@pytest.mark.parametrize(("kind", "counts"), [("basic", 11), ("bottleneck", 16), ("vgg", 8), ("convnext", 5)])
@pytest.mark.parametrize(
    ("name", "expected"), [("silu", nn.SiLU), ("relu6", nn.ReLU6), ("tanh", nn.Tanh), (None, nn.ReLU)]
)
def test_every_place_has_an_activation_module_of_its_own(kind, counts, name, expected):
    expected = nn.GELU if kind == "convnext" and name is None else expected
    model, calls = make(kind, "none", activation=name), []
    for module in model.modules():
        if type(module).__module__ == "torch.nn.modules.activation":
            assert type(module) is expected
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(images(2))
    assert len(calls) == len(set(calls)) == counts


def test_mobilenet_has_relu6_and_no_activation_where_channels_are_few():
    blocks = [m for m in make("mobilenet").modules() if isinstance(m, InvertedResidual)]
    assert [sum(isinstance(m, nn.ReLU6) for m in block.modules()) for block in blocks] == [1, 2, 2, 2, 2, 2, 2]
    assert all(not isinstance(block.conv[-1], nn.ReLU6) for block in blocks)


@pytest.mark.parametrize("kind", ["basic", "bottleneck", "mobilenet"])
def test_residual_branches_start_at_zero(kind):
    def first_residual(**changes):
        kinds = (BasicBlock, Bottleneck, InvertedResidual)
        blocks = (m for m in make(kind, **changes).modules() if isinstance(m, kinds))
        return next(
            m for m in blocks if getattr(m, "is_residual", isinstance(getattr(m, "downsample", 0), nn.Identity))
        )

    block = first_residual()
    x = torch.rand(2, next(block.parameters()).shape[1], 4, 4)
    assert torch.equal(block(x), x)
    for changes in ({"zero_init": False}, {"norm_scale": "fixed"}, {"norm": "none"}):
        assert not torch.equal(first_residual(**changes)(x), x)


def test_the_stride_of_a_bottleneck_is_in_its_3x3_convolution():
    blocks = [m for m in outline("resnet50").modules() if isinstance(m, Bottleneck)]
    assert [block.conv2.stride[0] for block in blocks] == [1, 1, 1, 2, 1, 1, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1]
    assert {(*block.conv1.stride, *block.conv3.stride) for block in blocks} == {(1, 1, 1, 1)}


def test_dropout_and_stochastic_depth_are_the_papers():
    def dropped(network):
        return [m.p for m in outline(network, "none").modules() if isinstance(m, nn.Dropout)]

    assert (dropped("vgg16"), dropped("mobilenet_v2"), dropped("resnet50")) == ([0.5, 0.5], [0.2], [])
    depths = [m.stochastic_depth.probability for m in outline("convnext_tiny").modules() if isinstance(m, Block)]
    assert depths == pytest.approx([0.1 * number / 17 for number in range(18)])


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    layer, x = StochasticDepth(0.25), torch.rand(4000, 3, 2, 2) + 1
    y = layer(x)
    kept = (y != 0).flatten(1).all(1)
    assert torch.equal(kept, (y != 0).flatten(1).any(1))
    assert kept.double().mean() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(y[kept], x[kept] / 0.75)
    assert layer.eval()(x) is x


@pytest.mark.parametrize("sides", [(1, 1), (2, 5), (7, 8), (8, 16), (9, 13)])
def test_adaptive_pooling_is_torchs(sides):
    x = torch.randn(2, 3, *sides, dtype=torch.float64, requires_grad=True)
    ours, torchs = AdaptivePool(*sides, 7).double()(x), nn.functional.adaptive_avg_pool2d(x, 7)
    torch.testing.assert_close(ours, torchs)
    weights = torch.randn(ours.shape, dtype=torch.float64)
    gradients = [torch.autograd.grad((out * weights).sum(), x)[0] for out in (ours, torchs)]
    torch.testing.assert_close(*gradients)
    assert AdaptivePool(*sides, 7).state_dict() == {}


@pytest.mark.parametrize("network", IMAGENET_NETWORKS)
def test_images_that_are_too_small_are_refused_with_the_number(network):
    message = rf"images of 31 x 224: {network} halves them 5 times, so dataset.image.shape has to be at least 32 x 32"
    with pytest.raises(ValueError, match=message):
        build_model(ModelSettings(network=network), image_shape=(3, 31, 224), num_classes=2)


@pytest.mark.parametrize("norm", ["instance", "switchable"])
@pytest.mark.parametrize(("kind", "side"), [("bottleneck", 32), ("mobilenet", 32), ("convnext", 63)])
def test_a_norm_that_needs_positions_is_refused_where_it_would_get_one(kind, side, norm):
    message = rf"model.norm {norm} needs several positions, and {kind} reduces images of {side} x {side} to one: .* "
    with pytest.raises(ValueError, match=message + rf"a side above {side}$"):
        make(kind, norm, side=side)
    model = make(kind, norm, side=side + 1)
    assert model(images(2, side + 1)).isfinite().all()
    assert make(kind, "group", side=side)(images(2, side)).isfinite().all()


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_the_smallest_images_of_vgg(norm):
    assert make("vgg", norm, side=32)(images(2, 32)).isfinite().all()


def test_instance_norm_is_not_between_the_pooling_and_the_classifier_of_convnext():
    """After it every image would be the same."""
    logits = perturbed(make("convnext", "instance"))(images(6))
    assert logits.std(0).min() > 1e-3


def test_grey_images_and_those_that_are_no_squares():
    for kind in ("resnet18", "mobilenet_v2"):
        model = build_model(ModelSettings(network=kind), image_shape=(1, 40, 72), num_classes=3).eval()
        assert model(torch.zeros(2, 1, 40, 72, dtype=torch.uint8)).shape == (2, 3)
    model = perturbed(make("vgg", side=64))
    assert model(images(2, 64)).shape == (2, CLASSES)


def test_depth_and_width_follow_from_the_name():
    assert NETWORKS["resnet50"] is IMAGENET_NETWORKS["resnet50"]
    plain, other = (
        {name: p.shape for name, p in outline("resnet50", **changes).named_parameters()}
        for changes in ({}, {"depth": 9, "width": 4, "block": "basic"})
    )
    assert plain == other


@pytest.mark.parametrize(("network", "groups"), [("mobilenet_v2", 32), ("resnet50", 5), ("vgg16", 12)])
def test_groups_that_do_not_divide_the_channels_are_named(network, groups):
    with pytest.raises(ValueError, match=rf"model.norm_groups {groups} does not divide \d+ channels; use a number"):
        outline(network, "group", norm_groups=groups)
