"""The networks for ImageNet, as users get them but with few and narrow layers: milliseconds at 64 x 64."""

from functools import partial
from unittest import mock

import torch

from models import NETWORKS, build_model
from models.networks.imagenet.convnext import ConvNeXt
from models.networks.imagenet.mobilenet import MobileNetV2
from models.networks.imagenet.resnet import BasicBlock, Bottleneck, ResNet
from models.networks.imagenet.vgg import VGG
from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings

SIDE, CLASSES = 64, 5
NARROW = {
    "basic": partial(ResNet, block=BasicBlock, blocks=(2, 1, 1, 1), width=8),
    "bottleneck": partial(ResNet, block=Bottleneck, blocks=(2, 1, 1, 1), width=8),
    "vgg": partial(VGG, convolutions=(1, 2, 1, 1, 1), width=8, hidden=16),
    "mobilenet": partial(
        MobileNetV2, stages=((1, 16, 1, 1), (2, 24, 2, 2), (2, 32, 1, 2), (2, 32, 2, 2), (2, 40, 1, 2))
    ),
    "convnext": partial(ConvNeXt, blocks=(1, 1, 2, 1), widths=(8, 16, 24, 32)),
}


def make(kind, norm="batch", *, side=SIDE, seed=0, **changes):
    """A network of `NARROW` or of the package, with its initial weights."""
    settings = ModelSettings(network=kind, norm=norm, **{"norm_groups": 4, **changes})
    with mock.patch.dict(NETWORKS, NARROW):  # two more names for `model.network`
        return build_model(settings, image_shape=(3, side, side), num_classes=CLASSES, seed=seed)


def outline(kind, norm="batch", *, num_classes=1000, **changes):
    """A network of the package at 224 x 224 pixels, without memory for its numbers."""
    settings = ModelSettings(network=kind, norm=norm, **changes)
    with torch.device("meta"):
        return NETWORKS[kind](settings, image_shape=(3, 224, 224), num_classes=num_classes, norm=make_norm(settings))


@torch.no_grad()
def perturbed(model, seed=1):
    """The model in evaluation mode; no scale is 1 or tiny, no shift or mean 0 and no variance 1."""
    random = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            drawn = torch.rand(values.shape, generator=random).to(values.dtype)
            if name in ("bias", "running_mean"):
                values.copy_(drawn - 0.5)
            elif name in ("layer_scale", "running_var", "running_square") or (name == "weight" and values.ndim == 1):
                values.copy_(drawn + 0.5)
    return model.eval()


def images(rows=4, side=SIDE, seed=2):
    return torch.randint(
        0, 256, (rows, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
