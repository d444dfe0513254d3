"""The residual network for small images of He et al. (2016, section 4.2), with any norm."""

from __future__ import annotations

import torch
from torch import nn

from models.norms import Norm


def _conv(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=not norm.shifts)


class BasicBlock(nn.Module):
    """ReLU(shortcut(x) + norm(conv(ReLU(norm(conv(x))))))

    The shortcut is the identity, or where shapes change a 1x1 convolution (option B).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm):
        super().__init__()
        self.conv1, self.norm1 = _conv(inputs, outputs, stride, norm), norm.layer(outputs)
        self.conv2, self.norm2 = _conv(outputs, outputs, 1, norm), norm.layer(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            project = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=not norm.shifts)
            self.shortcut = nn.Sequential(project, norm.layer(outputs))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norm1(self.conv1(x_nchw)))
        return torch.relu(self.shortcut(x_nchw) + self.norm2(self.conv2(inner)))


class ResNet(nn.Module):
    """``depth`` = 6n + 2 layers: a 3x3 convolution, then n blocks at each of three resolutions of ``width``,
    ``2 width`` and ``4 width`` channels, global average pooling, and a linear layer.

    Input (N, in_channels, H, W); output (N, num_classes).
    """

    def __init__(self, *, in_channels: int, num_classes: int, depth: int, width: int, norm: Norm):
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"model.depth {depth}: a resnet has 6n + 2 layers: 8, 14, 20, 32, 44, 56, 110")
        self.stem = nn.Sequential(_conv(in_channels, width, 1, norm), norm.layer(width), nn.ReLU())
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for number in range((depth - 2) // 6):
                outputs = width * 2**stage
                blocks.append(BasicBlock(channels, outputs, 2 if stage and not number else 1, norm))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(x_nchw)).mean(dim=(2, 3)))
