"""The wide residual network (Zagoruyko & Komodakis 2016, table 1), pre-activation as in He et al. (2016b)."""

from __future__ import annotations

import torch
from torch import nn

from models.activations import make_activation
from models.networks.resnet import STAGES, blocks_per_stage, check_positions, convolution, every, pixels_apart
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings


class PreActivationBlock(nn.Module):
    """The block computes ``shortcut(x) + conv(activation(norm(conv(activation(norm(x))))))``.

    Where shapes change, the shortcut is a 1x1 convolution of the activated norm, which it shares with the branch. The
    branch does not end with a norm, and `model.zero_init` does nothing here: with a scale of 0 before the second
    activation, a ReLU would pass no gradient and the branch stay at 0.

    The input has shape (N, inputs, H, W), the output (N, outputs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        self.norm1, self.activation1 = norm.layer(inputs), make_activation(settings.activation)
        self.conv1 = convolution(norm, inputs, outputs, 3, stride)
        self.norm2, self.activation2 = norm.layer(outputs), make_activation(settings.activation)
        self.conv2 = convolution(norm, outputs, outputs, 3)
        self.reshapes = stride != 1 or inputs != outputs
        self.apart = pixels_apart(inputs, stride)
        rest = stride // self.apart
        self.shortcut = convolution(norm, inputs, outputs, 1, rest) if self.reshapes else nn.Identity()

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        activated = self.activation1(self.norm1(x_nchw))
        inner = self.activation2(self.norm2(self.conv1(activated)))
        return self.shortcut(every(activated, self.apart) if self.reshapes else x_nchw) + self.conv2(inner)


class WideResNet(nn.Module):
    """The network has ``depth`` = 6n + 4 layers: a 3x3 convolution to ``width`` channels, then n blocks at each of
    three resolutions with ``k width``, ``2 k width`` and ``4 k width`` channels, k = ``widen``, then norm, activation,
    global average pooling, and a linear layer. It has no dropout.

    The 4 in the depth are the first convolution and those of three shortcuts. The paper's WRN-16-4 is ``depth`` 16,
    ``width`` 16, ``widen`` 4.

    The input has shape (N, C, H, W), the output (N, num_classes); both are float.

    Raises
    ------
    ValueError
        There is no wide resnet of this depth, or the images are too small for the norm.
    """

    def __init__(self, settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int, norm: Norm):
        super().__init__()
        per_stage = blocks_per_stage(settings, "a wide_resnet", 2 * STAGES, 4)
        check_positions(settings, image_shape, norm)
        channels = settings.width
        self.stem = convolution(norm, image_shape[0], channels, 3)
        blocks: list[nn.Module] = []
        for stage in range(STAGES):
            outputs = settings.width * settings.widen * 2**stage
            for number in range(per_stage):
                blocks.append(PreActivationBlock(channels, outputs, 2 if stage and not number else 1, norm, settings))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.activation = norm.layer(channels), make_activation(settings.activation)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.activation(self.norm(self.blocks(self.stem(x_nchw)))).mean(dim=(2, 3)))
