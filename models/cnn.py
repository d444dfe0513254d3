"""A plain CNN of configurable depth and width: convolution, norm, ReLU; no shortcuts."""

from __future__ import annotations

import torch
from torch import nn

from models.norms import Norm

STAGES = 3


class PlainCNN(nn.Module):
    """``depth`` 3x3 convolutions in three stages of ``width``, ``2 width``, ``4 width`` channels.

    Each stage ends with 2x2 max pooling; global average pooling and a linear layer follow. The convolutions are
    spread evenly over the stages, the later ones, which are cheaper, taking what is left over.

    Input (N, in_channels, H, W), H and W at least 8; output (N, num_classes).
    """

    def __init__(self, *, in_channels: int, num_classes: int, depth: int, width: int, norm: Norm):
        super().__init__()
        if depth < STAGES:
            raise ValueError(f"model.depth {depth}: the cnn has {STAGES} stages, so at least {STAGES} convolutions")
        layers: list[nn.Module] = []
        channels = in_channels
        for stage in range(STAGES):
            for _ in range((depth + stage) // STAGES):
                out = width * 2**stage
                layers += [
                    nn.Conv2d(channels, out, 3, padding=1, bias=not norm.shifts),
                    norm.layer(out),
                    nn.ReLU(),
                ]
                channels = out
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x_nchw).mean(dim=(2, 3)))
