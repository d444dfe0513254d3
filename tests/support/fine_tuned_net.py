"""A stranger's network for fine-tuning: its head is made first and called last, and a convolution has a bias before
batch norm."""

import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, channels: int, num_classes: int):
        super().__init__()
        self.out = nn.Linear(6, num_classes)
        self.stem = nn.Sequential(nn.Conv2d(channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.stem10 = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.neck = nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = torch.relu(self.bn(self.stem10(self.stem(x)))).mean((2, 3))
        return self.out(torch.relu(self.neck(features)))


def build(image_shape, num_classes):
    """What `model.network: fine_tuned_net:build` calls."""
    return Net(image_shape[0], num_classes)


def without_norm(image_shape, num_classes):
    """No batch norm to replace, and no single layer that makes the logits."""
    layers = nn.Sequential(nn.Flatten(), nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], num_classes))
    return nn.Sequential(layers, nn.PReLU())
