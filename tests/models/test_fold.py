"""Folded networks give what they gave, have no norm layers left, and what cannot be folded is said."""

import re

import pytest
import torch
from sklearn.datasets import load_digits
from small_networks import SMALL
from torch import nn

from models import build_model
from models.fold import FoldError, by_reason, fold
from models.norms.base import NormLayer
from models.norms.batch import BatchNorm
from models.norms.registry import NORMS
from models.norms.weight_standardization import StandardizedConv2d, StandardizedLinear
from pipeline.config.model import ModelSettings

FOLDABLE = ("batch", "batch_renorm", "power")
# Networks in which every norm follows a convolution of its own.
WHOLE = {
    "cnn": {},
    "inception": {},
    "resnet": {},
    "bottleneck": {"network": "resnet", "block": "bottleneck", "depth": 11},
}
DEPTHS = {"cnn": 4, "resnet": 8, "wide_resnet": 10}
FOLLOWS = "it follows {}, not a 2d convolution or linear layer"


def make(network, norm, **settings):
    """A network in float64 whose every number, but for those of the pixels' normalization, is random."""
    depth = {"depth": DEPTHS[network]} if network in DEPTHS else {}
    given = {"network": network, "norm": norm, "width": 4, "norm_groups": 2, **depth, **settings}
    model = build_model(ModelSettings(**given), image_shape=(3, 8, 8), num_classes=5).double().eval()
    return randomized(model)


def randomized(model):
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        for name, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if name in ("scale", "shift") or not values.is_floating_point():
                continue
            drawn = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            if name.startswith("running_") and name != "running_mean":
                drawn = drawn.abs() + 0.5
            elif values.ndim > 1:
                drawn *= (1 / values[0].numel()) ** 0.5
            values.data.copy_(drawn)
    return model


def images(rows=6):
    return torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))


def norm_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, NormLayer)]


def difference(one, other, x):
    with torch.inference_mode():
        return float((one(x) - other(x)).abs().max())


@pytest.mark.parametrize("norm", FOLDABLE)
@pytest.mark.parametrize("network", WHOLE)
@pytest.mark.parametrize("affine", ["learned", "fixed", "off"])
def test_a_folded_network_gives_the_same_and_has_no_norm_layers(network, norm, affine):
    model = make(**{"network": network, "norm": norm, "norm_scale": affine, "norm_shift": affine, **WHOLE[network]})
    before = {name: values.clone() for name, values in model.state_dict().items()}
    folded = fold(model)
    assert difference(folded.model, model, images()) <= 1e-10
    assert norm_layers(folded.model) == []
    assert (list(folded.folded), folded.left) == (norm_layers(model), {})
    assert len(folded.folded) > 1
    assert not any(parameter.requires_grad for parameter in folded.model.parameters())
    # The given one is as it was.
    assert all(torch.equal(before[name], values) for name, values in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("norm", FOLDABLE)
@pytest.mark.parametrize("network", SMALL)
def test_a_part_of_any_network_is_folded_and_the_rest_is_said(network, norm):
    model = make(network, norm)
    folded = fold(model, partial=True)
    assert difference(folded.model, model, images()) <= 1e-10
    assert norm_layers(folded.model) == list(folded.left)
    assert sorted([*folded.folded, *folded.left]) == sorted(norm_layers(model))


def test_in_a_wide_resnet_the_norms_between_convolutions_are_folded():
    """The first norm of a block follows a sum, and so does the last of the network."""
    assert fold(make("wide_resnet", "batch"), partial=True).left == {
        "1.blocks.0.norm1": "what 1.stem gives is used elsewhere, too",
        **dict.fromkeys(["1.blocks.1.norm1", "1.blocks.2.norm1", "1.norm"], FOLLOWS.format("a sum")),
    }


@pytest.mark.parametrize("place", ["pre", "post"])
def test_in_a_vision_transformer_norms_follow_sums(place):
    folded = fold(make("vit", "batch", norm_place=place), partial=True)
    assert folded.folded == ()
    assert set(folded.left.values()) == {FOLLOWS.format("flatten of a sum")}


def test_a_loop_over_time_has_no_one_graph():
    model = make("recurrent", "batch")
    with pytest.raises(
        FoldError, match="the network's graph cannot be traced: Proxy object cannot be iterated "
    ) as refused:
        fold(model)
    assert f"{len(norm_layers(model))} of {len(norm_layers(model))} norm layers cannot be folded: " in str(
        refused.value
    )
    assert " more)" in str(refused.value)  # there are hundreds; `left` has all
    assert list(fold(model, partial=True).left) == norm_layers(model)


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {*FOLDABLE, "none"}))
def test_statistics_of_a_sample_cannot_be_folded(norm):
    model = make("cnn", norm)
    with pytest.raises(FoldError) as refused:
        fold(model)
    reason = {
        "switchable": "switchable norm takes a part of its statistics from the sample itself",
        "instance": "InstanceNorm has no running statistics",
    }.get(norm, "GroupNorm has no running statistics")
    layers = ", ".join(norm_layers(model))
    assert str(refused.value) == f"4 of 4 norm layers cannot be folded: {reason} ({layers})"
    assert set(fold(model, partial=True).left.values()) == {reason}


class Shared(nn.Module):
    """Its first and its last two ReLUs take what is taken elsewhere, too."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1, bias=False), BatchNorm(3), nn.Conv2d(3, 3, 1)
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(5))

    def forward(self, x):
        first = self.relus[0](x)
        second = self.relus[1](self.norm(self.conv(x)))
        third = self.relus[2](torch.add(first, second))
        added = first - 1
        fourth = added
        fourth += third
        other = self.other(x)
        return self.relus[3](fourth) + added + x + self.relus[4](other) * other


def in_place(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.ReLU) and module.inplace]


def test_relus_work_in_place_where_nothing_else_takes_their_input():
    model = randomized(Shared().double().eval())
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    folded = fold(model).model
    assert in_place(folded) == ["relus.1", "relus.2"]
    assert in_place(model) == []
    assert difference(model, folded, x.clone()) < 1e-12
    before = x.clone()
    folded(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("network", WHOLE)
def test_all_relus_of_a_whole_network_work_in_place(network):
    settings = {"network": network, **WHOLE[network]}
    folded = fold(make(norm="batch", **settings)).model
    assert in_place(folded) == [name for name, module in folded.named_modules() if isinstance(module, nn.ReLU)]


def test_a_network_without_norms_is_copied():
    model = make("cnn", "none")
    folded = fold(model)
    assert (folded.folded, folded.left) == ((), {})
    assert difference(folded.model, model, images()) == 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, StandardizedConv2d])
def test_convolutions(kind, bias):
    """Biases, groups, strides, padding, and weights that are standardized; channels_last is kept."""
    options = {"stride": 2, "padding": 1, "groups": 2, "padding_mode": "reflect", "bias": bias}
    model = randomized(nn.Sequential(kind(4, 6, 3, **options), BatchNorm(6)).double().eval())
    model.to(memory_format=torch.channels_last)
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    folded = fold(model).model
    assert difference(folded, model, x) <= 1e-12
    assert type(folded[0]) is nn.Conv2d
    assert folded[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert folded(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, StandardizedLinear])
def test_linear_layers(kind, bias):
    model = randomized(nn.Sequential(kind(4, 6, bias=bias), BatchNorm(6)).double().eval())
    folded = fold(model).model
    assert difference(folded, model, torch.randn(3, 4, dtype=torch.float64)) <= 1e-12
    assert type(folded[0]) is nn.Linear


def test_a_model_in_training_mode_is_folded_as_it_evaluates():
    model = randomized(nn.Sequential(nn.Conv2d(1, 2, 3), BatchNorm(2)).double())
    folded = fold(model.train()).model
    assert model.training
    assert not folded.training
    assert difference(folded, model.eval(), torch.randn(2, 1, 5, 5, dtype=torch.float64)) <= 1e-12


class Odd(nn.Module):
    """Norms where they cannot be folded, each for a reason of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.twice, self.sum = (BatchNorm(3) for _ in range(4))
        self.late, self.never, self.narrow = BatchNorm(3), BatchNorm(3), BatchNorm(5)
        self.conv, self.again, self.line = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = self.first(x)
        y = self.conv(x)
        x = self.shared(y) + y
        x = self.twice(self.again(self.twice(self.again(x))))
        x = self.sum(x + y)
        x = self.late(torch.relu(x))
        return self.narrow(self.line(x.flatten(0, 1)[:, :5, :4]))


def test_every_norm_that_cannot_be_folded_is_named_with_its_reason():
    left = fold(Odd(), partial=True).left
    assert left == {
        "first": FOLLOWS.format("the network's input"),
        "shared": "what conv gives is used elsewhere, too",
        "twice": "it is called 2 times",
        "sum": FOLLOWS.format("a sum"),
        "late": FOLLOWS.format("relu"),
        "never": "it is called 0 times",
        "narrow": "line has 4 outputs, and the norm 5 channels",
    }
    with pytest.raises(FoldError, match=re.escape(f"7 of 7 norm layers cannot be folded: {by_reason(left)}")):
        fold(Odd())


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(2), nn.SyncBatchNorm(2), nn.InstanceNorm2d(2), nn.GroupNorm(1, 2)])
def test_norms_of_torchs_own_are_left_with_the_reason(norm):
    model = randomized(nn.Sequential(nn.Conv2d(1, 2, 3), BatchNorm(2), nn.Conv2d(2, 2, 1), norm).double().eval())
    reason = f"{type(norm).__name__} is torch's own: only norm layers of models.norms are folded"
    folded = fold(model, partial=True)
    assert (folded.folded, folded.left) == (("1",), {"3": reason})
    assert difference(folded.model, model, torch.randn(2, 1, 5, 5, dtype=torch.float64)) <= 1e-12
    with pytest.raises(FoldError, match=re.escape(f"1 of 2 norm layers cannot be folded: {reason} (3)")):
        fold(model)


class Shaped(nn.Sequential):
    """Goes another way for other images, so that it has no one graph."""

    def forward(self, x):
        return super().forward(x if x.shape[2] > 4 else x.repeat(1, 1, 2, 2))


def test_a_network_without_one_graph_is_refused():
    model = Shaped(nn.Conv2d(1, 2, 3), BatchNorm(2), nn.ReLU())
    with pytest.raises(
        FoldError, match=r"^1 of 1 norm layers cannot be folded: the network's graph cannot be traced: "
    ):
        fold(model)
    x = torch.randn(2, 1, 5, 5)
    assert difference(fold(model, partial=True).model, model.eval(), x) == 0


def test_a_layer_under_two_names_is_replaced_under_both():
    conv = nn.Conv2d(1, 2, 3)
    model = randomized(Aliased(conv, nn.Sequential(conv, BatchNorm(2))).double().eval())
    folded = fold(model).model
    assert folded.first is folded.second[0]
    assert difference(folded, model, torch.randn(2, 1, 5, 5, dtype=torch.float64)) <= 1e-12


class Aliased(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(x)


@pytest.fixture
def one_thread():
    """Small steps take longer in several, the more where the machine is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_a_trained_network_gives_the_same_logits_in_float32(one_thread):
    """A resnet that has learned scikit-learn's digits; float32, both memory layouts."""
    digits = load_digits()
    x = torch.from_numpy((digits.images * 15).astype("uint8"))[:, None]
    y = torch.from_numpy(digits.target)
    settings = ModelSettings(network="resnet", norm="batch", depth=8, width=8)
    model = build_model(settings, image_shape=(1, 8, 8), num_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for rows in torch.randperm(1500, generator=torch.Generator().manual_seed(0)).repeat(4).split(50):
        loss = nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    folded = fold(model).model
    assert norm_layers(folded) == []
    with torch.inference_mode():
        assert float((model(x[1500:]).argmax(1) == y[1500:]).double().mean()) > 0.8
    for layout in (torch.contiguous_format, torch.channels_last):
        model, folded = (module.to(memory_format=layout) for module in (model, folded))
        assert difference(folded, model, x[1500:].contiguous(memory_format=layout)) <= 1e-4
