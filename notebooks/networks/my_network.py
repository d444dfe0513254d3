"""A network as you have it, in a file of its own. It imports nothing of sparknorm."""

from torch import nn


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.relu = nn.ReLU()

    def forward(self, x):
        return self.relu(x + self.branch(x))


def build(image_shape, num_classes, width=16, blocks=2):
    """Called by keyword: image_shape is (channels, height, width), and the rest is from `model.options`."""
    return nn.Sequential(
        nn.Conv2d(image_shape[0], width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        *(Residual(width) for _ in range(blocks)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, num_classes),
    )
