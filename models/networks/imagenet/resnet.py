"""The residual networks for ImageNet (He et al. 2016, table 1), with any norm.

Parameters have the names and shapes of torchvision's, whose weight files load with batch norm: ``bn1`` is the name of
whatever norm is there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.activations import make_activation
from models.networks.imagenet.layers import REDUCTION, check_images
from models.networks.resnet import convolution, last_norm
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings


def _downsample(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """Return the shortcut: the identity, or where shapes change a 1x1 convolution and a norm (He et al. 2016, option
    B)."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    return nn.Sequential(convolution(norm, inputs, outputs, 1, stride), norm.layer(outputs))


class BasicBlock(nn.Module):
    """The block computes ``activation(shortcut(x) + norm(conv(activation(norm(conv(x))))))``, both convolutions 3x3,
    the first with the stride (He et al. 2016, figure 5, left).

    The input has shape (N, inputs, H, W), the output (N, channels, ceil(H / stride), ceil(W / stride)).

    Attributes
    ----------
    expansion : int
        The number of output channels for each of ``channels``.
    """

    expansion = 1

    def __init__(self, inputs: int, channels: int, stride: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        self.conv1, self.bn1 = convolution(norm, inputs, channels, 3, stride), norm.layer(channels)
        self.conv2, self.bn2 = convolution(norm, channels, channels, 3), last_norm(channels, norm, settings)
        self.downsample = _downsample(inputs, channels, stride, norm)
        self.activation1, self.activation2 = (make_activation(settings.activation) for _ in range(2))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        inner = self.bn2(self.conv2(self.activation1(self.bn1(self.conv1(x_nchw)))))
        # Not +, which a trace does not tell from +=: see `models.fold`.
        return self.activation2(torch.add(self.downsample(x_nchw), inner))


class Bottleneck(nn.Module):
    """The block is a `BasicBlock` with three convolutions (He et al. 2016, figure 5, right): 1x1 to ``channels``, 3x3
    with the stride, and 1x1 to ``4 channels``. The paper has the stride in the first; in the second, as here, it makes
    the network that is called ResNet v1.5 (Goyal et al. 2017, section 5.1).

    The input has shape (N, inputs, H, W), the output (N, 4 channels, ceil(H / stride), ceil(W / stride)).
    """

    expansion = 4

    def __init__(self, inputs: int, channels: int, stride: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        outputs = channels * self.expansion
        self.conv1, self.bn1 = convolution(norm, inputs, channels, 1), norm.layer(channels)
        self.conv2, self.bn2 = convolution(norm, channels, channels, 3, stride), norm.layer(channels)
        self.conv3, self.bn3 = convolution(norm, channels, outputs, 1), last_norm(outputs, norm, settings)
        self.downsample = _downsample(inputs, outputs, stride, norm)
        self.activation1, self.activation2, self.activation3 = (make_activation(settings.activation) for _ in range(3))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        inner = self.activation1(self.bn1(self.conv1(x_nchw)))
        inner = self.bn3(self.conv3(self.activation2(self.bn2(self.conv2(inner)))))
        return self.activation3(torch.add(self.downsample(x_nchw), inner))


class ResNet(nn.Module):
    """The network is a 7x7 convolution with stride 2, 3x3 max pooling with stride 2, four stages of blocks with
    ``width``, ``2 width``, ``4 width`` and ``8 width`` channels, of which all but the first begin with a stride of 2,
    global average pooling, and a linear layer.

    The input has shape (N, C, H, W) with H and W at least 32, the output (N, num_classes); both are float.

    Parameters
    ----------
    settings : ModelSettings
        Of its settings `norm`, `activation`, `zero_init` and what belongs to the norm count here.
    image_shape : tuple of 3 ints
        C, H and W in pixels.
    num_classes : int
        The number of logits.
    norm : Norm
        The normalization.
    block : type
        `BasicBlock` or `Bottleneck`.
    blocks : sequence of 4 ints
        The number of blocks in each stage.
    width : int
        The channels of the first stage, for bottlenecks those inside a block.

    Raises
    ------
    ValueError
        The images are too small for the network or the norm.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        norm: Norm,
        block: type[BasicBlock] | type[Bottleneck],
        blocks: Sequence[int],
        width: int = 64,
    ):
        super().__init__()
        check_images(settings, image_shape, norm, one_position_up_to=REDUCTION)
        self.conv1, self.bn1 = convolution(norm, image_shape[0], width, 7, 2), norm.layer(width)
        self.activation, self.maxpool = make_activation(settings.activation), nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        inputs = width
        for stage, count in enumerate(blocks):
            layers: list[nn.Module] = []
            for number in range(count):
                stride = 2 if stage and not number else 1
                layers.append(block(inputs, width * 2**stage, stride, norm, settings))
                inputs = width * 2**stage * block.expansion
            stages.append(nn.Sequential(*layers))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(inputs, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        x_nchw = self.maxpool(self.activation(self.bn1(self.conv1(x_nchw))))
        x_nchw = self.layer4(self.layer3(self.layer2(self.layer1(x_nchw))))
        return self.fc(x_nchw.mean(dim=(2, 3)))
