import io

import pytest
import torch

from models import NETWORKS, build_model
from models.norms import NORMS
from pipeline.config import ModelSettings

DEPTHS = {"cnn": (3, 4, 7), "resnet": (8, 14)}


def make(network, norm, depth=None, channels=3, seed=0):
    settings = ModelSettings(network=network, norm=norm, depth=depth or DEPTHS[network][0], width=4, norm_groups=2)
    return build_model(settings, image_shape=(channels, 16, 16), num_classes=5, seed=seed)


@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_every_network_with_every_norm_trains_a_step_and_round_trips(network, norm):
    for depth in DEPTHS[network]:
        model = make(network, norm, depth)
        images = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
        labels = torch.arange(6) % 5
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        losses = []
        for _ in range(8):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        other = make(network, norm, depth, seed=1)
        other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
        assert torch.equal(other.eval()(images), model.eval()(images))


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_convolutions_have_biases_only_where_no_norm_shifts(network):
    convolutions = [m for m in make(network, "none").modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.bias is not None for m in convolutions)
    convolutions = [m for m in make(network, "batch").modules() if isinstance(m, torch.nn.Conv2d)]
    assert all(m.bias is None for m in convolutions)


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_arms_start_from_the_same_shared_weights(network):
    reference = dict(make(network, "none").named_parameters())
    for norm in ("batch", "group", "layer"):
        other = dict(make(network, norm).named_parameters())
        shared = [name for name in reference if reference[name].ndim > 1]
        # The projection of a resnet's shortcut is the only other place for weights; norms have one axis.
        assert shared == [name for name in other if other[name].ndim > 1]
        assert all(torch.equal(reference[name], other[name]) for name in shared)
    assert not torch.equal(next(make(network, "none", seed=1).parameters()), next(iter(reference.values())))


@pytest.mark.parametrize(("depth", "counts"), [(3, [1, 1, 1]), (4, [1, 1, 2]), (5, [1, 2, 2]), (9, [3, 3, 3])])
def test_depth_of_the_cnn(depth, counts):
    widths = [m.out_channels for m in make("cnn", "none", depth).modules() if isinstance(m, torch.nn.Conv2d)]
    assert [widths.count(width) for width in (4, 8, 16)] == counts


@pytest.mark.parametrize("depth", [8, 14, 20])
def test_depth_of_the_resnet(depth):
    layers = [
        m
        for name, m in make("resnet", "batch", depth).named_modules()
        if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear)) and "shortcut" not in name
    ]
    assert len(layers) == depth


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"network": "vgg"}, "model.network 'vgg' is unknown; known are cnn, resnet"),
        ({"network": "cnn", "depth": 2}, "model.depth 2: the cnn has 3 stages"),
        ({"network": "resnet", "depth": 9}, "model.depth 9: a resnet has 6n . 2 layers"),
    ],
)
def test_what_cannot_be_built_is_said(settings, message):
    with pytest.raises(ValueError, match=message):
        build_model(ModelSettings(**settings), image_shape=(1, 28, 28), num_classes=10)


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
