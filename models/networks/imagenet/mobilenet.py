"""MobileNetV2 (Sandler et al. 2018), with any norm. Parameters have the names and shapes of torchvision's."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.activations import make_activation
from models.networks.imagenet.layers import REDUCTION, check_images
from models.networks.resnet import last_norm
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

# Expansion, output channels, number of blocks, and stride of the first (Sandler et al. 2018, table 2).
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


class ConvUnit(nn.Sequential):
    """The unit computes ``activation(norm(conv(x)))``; with a stride of 1 it keeps the height and width of the image,
    and with as many groups as channels the convolution is depthwise."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        norm: Norm,
        settings: ModelSettings,
        *,
        stride: int = 1,
        groups: int = 1,
    ):
        conv = norm.conv(
            inputs, outputs, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=not norm.replaces_bias
        )
        super().__init__(conv, norm.layer(outputs), make_activation(settings.activation, default="relu6"))


class InvertedResidual(nn.Module):
    """The block expands its channels by a 1x1 convolution, filters each by a 3x3 convolution of its own with the
    stride, and projects them by a 1x1 convolution to the output channels (Sandler et al. 2018, table 1). A norm follows
    each convolution and an activation all but the last; without a stride, and with as many outputs as inputs, the input
    is added.

    The input has shape (N, inputs, H, W), the output (N, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        self.is_residual = stride == 1 and inputs == outputs
        hidden = inputs * expansion
        expand = [ConvUnit(inputs, hidden, 1, norm, settings)] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            ConvUnit(hidden, hidden, 3, norm, settings, stride=stride, groups=hidden),
            norm.conv(hidden, outputs, 1, bias=not norm.replaces_bias),
            last_norm(outputs, norm, settings) if self.is_residual else norm.layer(outputs),
        )

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return x_nchw + self.conv(x_nchw) if self.is_residual else self.conv(x_nchw)


class MobileNetV2(nn.Module):
    """The network is a 3x3 convolution with stride 2 to 32 channels, seven stages of inverted residuals, a 1x1
    convolution to 1,280 channels, global average pooling, dropout of 0.2, and a linear layer (Sandler et al. 2018,
    table 2).

    The input has shape (N, C, H, W) with H and W at least 32, the output (N, num_classes); both are float.

    Parameters
    ----------
    settings : ModelSettings
        Of its settings `norm`, `activation` (null: relu6), `zero_init` and what belongs to the norm count here.
    image_shape : tuple of 3 ints
        C, H and W in pixels.
    num_classes : int
        The number of logits.
    norm : Norm
        The normalization.
    stages : sequence of 4 ints each
        Expansion, output channels, number of blocks, and stride of the first.

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
        stages: Sequence[tuple[int, int, int, int]] = STAGES,
    ):
        super().__init__()
        check_images(settings, image_shape, norm, one_position_up_to=REDUCTION)
        channels = 32
        layers: list[nn.Module] = [ConvUnit(image_shape[0], channels, 3, norm, settings, stride=2)]
        for expansion, outputs, count, first_stride in stages:
            for number in range(count):
                stride = 1 if number else first_stride
                layers.append(InvertedResidual(channels, outputs, stride, expansion, norm, settings))
                channels = outputs
        self.features = nn.Sequential(*layers, ConvUnit(channels, 4 * channels, 1, norm, settings))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4 * channels, num_classes))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x_nchw).mean(dim=(2, 3)))
