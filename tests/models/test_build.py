"""Every network with every norm: trained, saved, exported, traced, and its initial weights."""

import numpy as np
import pytest
import torch
from small_networks import KINDS, SMALL, make, settings_of
from torch import nn

from models import NETWORKS, NORMS, build_model
from models.networks.imagenet import IMAGENET_NETWORKS
from models.norms.batch import BatchNorm
from pipeline.config.model import ModelSettings
from pipeline.training import checkpoint

ARMS = {
    **{norm: {"norm": norm} for norm in NORMS},
    **{f"batch by {statistics}": {"norm": "batch", "norm_statistics": statistics} for statistics in ("lane", "world")},
}
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 8, 8), dtype=np.uint8))
LABELS = torch.arange(8) % 5


def make_arm(kind, arm, **options):
    """A network with an arm of `ARMS`; batch norm by lane has two lanes, and that over the world a world of one."""
    model = make(kind, **ARMS[arm], **options)
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            layer.lanes, layer.sum_over_ranks = 2, lambda values: values
    return model


def test_no_network_is_left_out_of_these_tests():
    """Those for ImageNet are in tests/models/networks/test_imagenet*.py."""
    assert set(NETWORKS) == {*SMALL, *IMAGENET_NETWORKS}


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_network_with_every_norm_trains_round_trips_and_computes_in_bf16(kind, arm, tmp_path):
    model = make_arm(kind, arm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    losses = []
    for _ in range(6):
        loss = nn.functional.cross_entropy(model(IMAGES), LABELS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    identity = {"model": settings_of(kind, **ARMS[arm]).model_dump(mode="json")}
    checkpoint.save(str(tmp_path), {"model": model.state_dict()}, step=6, identity=identity, keep=1)
    other = make_arm(kind, arm, seed=1)
    other.load_state_dict(checkpoint.load_newest(str(tmp_path), identity=identity, device=torch.device("cpu"))["model"])
    logits = model.eval()(IMAGES)
    assert torch.equal(other.eval()(IMAGES), logits)
    assert logits.std(0).max() > 1e-4  # images are told apart
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(IMAGES).float(), logits, atol=0.05, rtol=0.05)
        nn.functional.cross_entropy(other.train()(IMAGES), LABELS).backward()
    assert all(torch.isfinite(p.grad).all() for p in other.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_and_float64(kind):
    model = make(kind, "batch").eval()
    logits = model(IMAGES)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(IMAGES.contiguous(memory_format=torch.channels_last)), logits)
    doubled = model.double()(IMAGES)
    assert doubled.dtype == torch.float64
    torch.testing.assert_close(doubled.float(), logits)


@pytest.mark.parametrize("kind", SMALL)
def test_exports_with_any_batch_size(kind):
    model = make(kind).eval()
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    for rows in (1, 5):
        torch.testing.assert_close(exported.module()(IMAGES[:rows]), model(IMAGES[:rows]))


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"recurrent", "gru"}))
def test_can_be_traced(kind):
    model = make(kind).eval()
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_have_biases_only_where_no_norm_shifts(kind):
    def biases(norm, **changes):
        layers = {name: m for name, m in make(kind, norm, **changes).named_modules() if hasattr(m, "bias")}
        return {name: m.bias is not None for name, m in layers.items() if isinstance(m, (nn.Conv2d, nn.Linear))}

    assert all(biases("none").values())
    # After a norm, not before one.
    rest = {"1.classifier", *(f"1.blocks.{n}.{name}" for n in (0, 1) for name in ("attention.qkv", "mlp.0"))}
    for norm, changes in (("batch", {}), ("batch", {"norm_shift": "off"}), ("layer", {})):
        assert {name for name, has in biases(norm, **changes).items() if has} <= rest
    assert all(biases("layer", norm_shift="off").values())


@pytest.mark.parametrize("kind", KINDS)
def test_arms_start_from_the_same_shared_weights(kind):
    reference = {name: p for name, p in make(kind, "none").named_parameters() if p.ndim > 1}
    for norm in NORMS:
        other = {name: p for name, p in make(kind, norm).named_parameters() if p.ndim > 1}  # norms have one axis
        assert list(other) == list(reference)
        assert all(torch.equal(reference[name], other[name]) for name in reference)
    changed = dict(make(kind, "none", seed=1).named_parameters())
    assert not any(torch.equal(weight, changed[name]) for name, weight in reference.items())


@pytest.mark.parametrize("kind", KINDS)
def test_init_scale_is_a_factor_on_convolutions_and_linear_layers(kind):
    plain, scaled = (dict(make(kind, init_scale=scale).named_parameters()) for scale in (1.0, 0.25))
    for name, value in plain.items():
        factor = 0.25 if value.ndim > 1 and "positions" not in name else 1.0
        torch.testing.assert_close(scaled[name], value * factor, rtol=0, atol=0)


def test_initial_weights_suit_the_activation():
    relu, sigmoid, tanh = (make("cnn", activation=name)[1].features[0].weight for name in (None, "sigmoid", "tanh"))
    torch.testing.assert_close(relu, sigmoid * 2**0.5)
    torch.testing.assert_close(tanh, sigmoid * 5 / 3)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "gelu", "silu"])
@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"recurrent", "gru"}))
def test_every_place_has_an_activation_module_of_its_own(kind, name):
    model = make(kind, "none", activation=name)
    expected = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}[name]
    calls = []
    for module in model.modules():
        if isinstance(module, (nn.ReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU)):
            assert type(module) is expected
            module.register_forward_hook(lambda module, *_: calls.append(module))
    model(IMAGES)
    counts = {"cnn": 3, "inception": 22, "resnet": 7, "bottleneck": 10, "wide_resnet": 7, "vit": 2, "post": 2}
    assert len(calls) == len(set(calls)) == counts[kind]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "vgg"}, "model.network 'vgg' is unknown; known are cnn, convnext_tiny, inception, mob"),
        ({"network": "cnn", "depth": 2}, "model.depth 2: the cnn has 3 stages"),
        ({"network": "inception", "depth": 2}, "model.depth 2: the inception network has 3 stages, so at least 3"),
        ({"network": "resnet", "depth": 9}, r"model.depth 9: a resnet of basic blocks has 6n \+ 2 layers: 8, 14, 20"),
        ({"network": "resnet", "depth": 8, "block": "bottleneck"}, r"bottleneck blocks has 9n \+ 2 layers: 11, 20, 29"),
        ({"network": "wide_resnet", "depth": 8}, r"model.depth 8: a wide_resnet has 6n \+ 4 layers: 10, 16, 22, 28"),
        ({"network": "vit", "patch": 5}, r"model.patch 5 .* 4 x 4 into whole patches: use one of \[1, 2, 4\]"),
        (
            {"network": "vit", "heads": 3},
            r"model.heads 3 does not divide model.width 16: use one of \[1, 2, 4, 8, 16\]",
        ),
        *(
            ({"network": "vit", "patch": 4, "norm": norm}, rf"model.norm {norm} .* model.patch 4 makes one token of")
            for norm in ("instance", "switchable")
        ),
        ({"network": "recurrent", "activation": "relu"}, "model.activation relu: the cells .* set it to null"),
        ({"network": "cnn"}, "images of 4 x 4: the cnn halves them 3 times, so dataset.image.shape .* at least 8 x 8"),
        ({"network": "inception"}, "images of 4 x 4: the inception network .* dataset.image.shape .* at least 8 x 8"),
        ({"network": "resnet", "depth": 8, "norm": "instance"}, "model.norm instance needs several positions, and the"),
        (
            {"network": "wide_resnet", "depth": 10, "norm": "switchable"},
            "the wide_resnet reduces images of 4 x 4 to one",
        ),
    ],
)
def test_what_cannot_be_built_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelSettings(**settings), image_shape=(1, 4, 4), num_classes=10)


def test_images_are_normalized_inside_the_model():
    images = torch.randint(0, 256, (50, 2, 9, 9), dtype=torch.uint8)
    scaled = images.double() / 255
    mean, std = scaled.mean((0, 2, 3)), scaled.std((0, 2, 3), correction=0)
    model = build_model(
        ModelSettings(width=4), image_shape=(2, 9, 9), num_classes=3, mean=mean.tolist(), std=std.tolist()
    )
    out = model[0](images)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean((0, 2, 3)), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std((0, 2, 3), correction=0), torch.ones(2), atol=1e-4, rtol=0)
