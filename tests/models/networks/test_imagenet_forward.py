"""The networks for ImageNet against functions of their weights, written from the papers and the published names;
folded; and exported."""

import importlib.util

import pytest
import torch
from small_imagenet import NARROW, SIDE, images, make, perturbed
from torch.nn import functional as F

from models.fold import FoldError, fold
from models.norms.base import NormLayer
from pipeline.serving import formats
from pipeline.serving.result import ONNX_PACKAGES

HAS_ONNX = all(importlib.util.find_spec(name) for name in ONNX_PACKAGES)


class Weights:
    """The tensors of a weight file by their names, and the layers that they make."""

    def __init__(self, state):
        self.state = state

    def __contains__(self, name):
        return name in self.state

    def conv(self, name, x, **options):
        return F.conv2d(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"), **options)

    def linear(self, name, x):
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def batch_norm(self, name, x):
        mean, var, weight, bias = (
            self.state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * weight + bias

    def layer_norm(self, name, x_nchw):
        mean = x_nchw.mean(1, keepdim=True)
        var = x_nchw.var(1, keepdim=True, correction=0)
        weight, bias = (self.state[f"{name}.{part}"].view(-1, 1, 1) for part in ("weight", "bias"))
        return (x_nchw - mean) / (var + 1e-5).sqrt() * weight + bias


def resnet(w, x, blocks):
    """He et al. 2016, table 1, with the stride in the 3x3 convolution."""
    x = F.max_pool2d(w.batch_norm("bn1", w.conv("conv1", x, stride=2, padding=3)).relu(), 3, 2, 1)
    for stage, count in enumerate(blocks, 1):
        for number in range(count):
            name, stride = f"layer{stage}.{number}", 2 if stage > 1 and number == 0 else 1
            shortcut = x
            if f"{name}.downsample.0.weight" in w:
                shortcut = w.conv(f"{name}.downsample.0", x, stride=stride)
                shortcut = w.batch_norm(f"{name}.downsample.1", shortcut)
            if f"{name}.conv3.weight" in w:
                x = w.batch_norm(f"{name}.bn1", w.conv(f"{name}.conv1", x)).relu()
                x = w.batch_norm(f"{name}.bn2", w.conv(f"{name}.conv2", x, stride=stride, padding=1)).relu()
                x = w.batch_norm(f"{name}.bn3", w.conv(f"{name}.conv3", x))
            else:
                x = w.batch_norm(f"{name}.bn1", w.conv(f"{name}.conv1", x, stride=stride, padding=1)).relu()
                x = w.batch_norm(f"{name}.bn2", w.conv(f"{name}.conv2", x, padding=1))
            x = (x + shortcut).relu()
    return w.linear("fc", x.mean((2, 3)))


def vgg(w, x, convolutions):
    """Simonyan & Zisserman 2015, table 1; layers are numbered as they come, ReLUs and poolings too."""
    number = 0
    for count in convolutions:
        for _ in range(count):
            x, number = w.conv(f"features.{number}", x, padding=1), number + 1
            if f"features.{number}.running_mean" in w:
                x, number = w.batch_norm(f"features.{number}", x), number + 1
            x, number = x.relu(), number + 1
        x, number = F.max_pool2d(x, 2), number + 1
    x = F.adaptive_avg_pool2d(x, 7).flatten(1)
    return w.linear("classifier.6", w.linear("classifier.3", w.linear("classifier.0", x).relu()).relu())


def mobilenet(w, x, stages):
    """Sandler et al. 2018, tables 1 and 2."""
    relu6 = F.relu6
    x, number = relu6(w.batch_norm("features.0.1", w.conv("features.0.0", x, stride=2, padding=1))), 1
    for _, _, count, first_stride in stages:
        for index in range(count):
            name, inputs, stride, part = f"features.{number}.conv", x, first_stride if index == 0 else 1, 0
            if f"{name}.3.weight" in w:
                x, part = relu6(w.batch_norm(f"{name}.0.1", w.conv(f"{name}.0.0", x))), 1
            filtered = w.conv(f"{name}.{part}.0", x, stride=stride, padding=1, groups=x.shape[1])
            x = w.conv(f"{name}.{part + 1}", relu6(w.batch_norm(f"{name}.{part}.1", filtered)))
            x, number = w.batch_norm(f"{name}.{part + 2}", x), number + 1
            x = x + inputs if x.shape == inputs.shape else x
    x = relu6(w.batch_norm(f"features.{number}.1", w.conv(f"features.{number}.0", x)))
    return w.linear("classifier.1", x.mean((2, 3)))


def convnext(w, x, blocks):
    """Liu et al. 2022, figure 4 and table 9."""
    x = w.layer_norm("features.0.1", w.conv("features.0.0", x, stride=4))
    for stage, count in enumerate(blocks):
        if stage:
            x = w.conv(f"features.{2 * stage}.1", w.layer_norm(f"features.{2 * stage}.0", x), stride=2)
        for number in range(count):
            name = f"features.{2 * stage + 1}.{number}"
            inner = w.layer_norm(f"{name}.block.2", w.conv(f"{name}.block.0", x, padding=3, groups=x.shape[1]))
            inner = F.gelu(w.linear(f"{name}.block.3", inner.movedim(1, -1)))
            inner = w.linear(f"{name}.block.5", inner).movedim(-1, 1)
            x = x + w.state[f"{name}.layer_scale"] * inner
    x = w.layer_norm("classifier.0", x.mean((2, 3), keepdim=True))
    return w.linear("classifier.2", x.flatten(1))


def arguments(kind):
    """What the function of this kind needs to know beside the weights."""
    return next(
        NARROW[kind].keywords[name] for name in ("blocks", "convolutions", "stages") if name in NARROW[kind].keywords
    )


FULL_STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
FORWARD = [
    *(("basic", "batch", SIDE, resnet), ("bottleneck", "batch", SIDE, resnet), ("vgg", "none", SIDE, vgg)),
    *(("vgg", "batch", SIDE, vgg), ("vgg", "batch", 224, vgg), ("vgg", "none", 40, vgg)),
    *(
        ("mobilenet", "batch", SIDE, mobilenet),
        ("convnext", "layer", SIDE, convnext),
        ("convnext", "layer", 90, convnext),
    ),
]


@torch.inference_mode()
def compare(model, function, known, side):
    x = model[0](images(3, side))
    expected = function(Weights(model[1].state_dict()), x, known)
    torch.testing.assert_close(model[1](x), expected, rtol=1e-8, atol=1e-8)
    assert expected.std(0).min() > 1e-4  # images are told apart


@pytest.mark.parametrize(("kind", "norm", "side", "function"), FORWARD)
def test_the_network_is_the_papers(kind, norm, side, function):
    compare(perturbed(make(kind, norm, side=side)).double(), function, arguments(kind), side)


@pytest.mark.parametrize(
    ("network", "norm", "function", "known"),
    [
        ("resnet18", "batch", resnet, (2, 2, 2, 2)),
        ("resnet50", "batch", resnet, (3, 4, 6, 3)),
        ("mobilenet_v2", "batch", mobilenet, FULL_STAGES),
        ("convnext_tiny", "layer", convnext, (3, 3, 9, 3)),
    ],
)
def test_whole_networks_are_the_papers(network, norm, function, known):
    compare(perturbed(make(network, norm)).double(), function, known, SIDE)


def norm_layers(model):
    return [name for name, module in model.named_modules() if isinstance(module, NormLayer)]


def difference(one, other, x):
    with torch.inference_mode():
        return float((one(x) - other(x)).abs().max() / other(x).abs().max())


@pytest.mark.parametrize("norm", ["batch", "batch_renorm", "power"])
@pytest.mark.parametrize("kind", sorted(set(NARROW) - {"convnext"}))
def test_norms_are_folded_and_logits_stay(kind, norm):
    model = perturbed(make(kind, norm)).double()
    folded = fold(model)
    assert (norm_layers(folded.model), folded.left) == ([], {})
    assert list(folded.folded) == norm_layers(model)
    assert difference(folded.model, model, images()) <= 1e-10


def test_resnet50_is_folded_in_float32():
    model = perturbed(make("resnet50"))
    folded = fold(model)
    assert (len(folded.folded), norm_layers(folded.model)) == (53, [])
    assert difference(folded.model, model, images()) <= 1e-4
    relus = [m for m in folded.model.modules() if isinstance(m, torch.nn.ReLU)]
    assert len(relus) == 49
    assert all(relu.inplace for relu in relus)


def test_what_of_convnext_can_be_folded():
    """Norms after a convolution of their own can; those before one, and after the pooling, cannot."""
    model = perturbed(make("convnext", "batch")).double()
    folded = fold(model, partial=True)
    assert difference(folded.model, model, images()) <= 1e-10
    assert {name.split(".", 1)[1] for name in folded.left} == {
        *("features.2.0", "features.4.0", "features.6.0", "classifier.0")
    }
    assert len(folded.folded) == 6
    with pytest.raises(FoldError, match="4 of 10 norm layers cannot be folded"):
        fold(model)


# A few of the pairs: each takes seconds, and `tests/serving` has all formats with the small networks.
FILES = [
    *(("torchscript", kind, "batch") for kind in ("bottleneck", "vgg", "mobilenet")),
    *(("torchscript", "convnext", "layer"), ("pt2", "vgg", "none"), ("pt2", "convnext", "layer")),
    pytest.param(
        *("onnx", "mobilenet", "batch"),
        marks=pytest.mark.skipif(not HAS_ONNX, reason="needs pip install 'sparknorm[onnx]'"),
    ),
]


@pytest.mark.parametrize(("form", "kind", "norm"), FILES)
def test_files_that_serve_them_take_any_batch_size(form, kind, norm):
    model = fold(perturbed(make(kind, norm)), partial=True).model
    chosen = formats.FORMATS[form]
    run = chosen.load(chosen.write(model, torch.zeros(2, 3, SIDE, SIDE, dtype=torch.uint8)))
    for rows in (1, 3):
        x = images(rows)
        with torch.inference_mode():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-4)
