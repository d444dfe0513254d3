"""The literature's networks for photographs of 224 x 224 pixels, with any norm, and parameters named and shaped as
torchvision publishes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from models.networks.imagenet.convnext import ConvNeXt
from models.networks.imagenet.mobilenet import MobileNetV2
from models.networks.imagenet.resnet import BasicBlock, Bottleneck, ResNet
from models.networks.imagenet.vgg import VGG

# Each is called as those of `models.NETWORKS`. Depth and width follow from the name: the settings have no say in them.
IMAGENET_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "resnet18": partial(ResNet, block=BasicBlock, blocks=(2, 2, 2, 2)),
    "resnet34": partial(ResNet, block=BasicBlock, blocks=(3, 4, 6, 3)),
    "resnet50": partial(ResNet, block=Bottleneck, blocks=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, block=Bottleneck, blocks=(3, 4, 23, 3)),
    "vgg11": partial(VGG, convolutions=(1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, convolutions=(2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, convolutions=(2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, convolutions=(2, 2, 4, 4, 4)),
    "mobilenet_v2": MobileNetV2,
    "convnext_tiny": ConvNeXt,
}
