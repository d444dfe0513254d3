from itertools import pairwise

from torch import nn

from photonets.blocks import FunctionalNorm, Residual


class PhotoNet(nn.Module):
    def __init__(self, channels, classes, width, blocks, head_norm):
        super().__init__()
        act = nn.ReLU()  # shared by all blocks
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), act)
        widths = [width * (1 + n // 2) for n in range(blocks + 1)]
        self.blocks = nn.ModuleList(Residual(a, b, act) for a, b in pairwise(widths))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head_norm = FunctionalNorm(widths[-1]) if head_norm else nn.Identity()
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.head_norm(self.pool(x).flatten(1)))


def build(image_shape, num_classes, width=8, blocks=2, head_norm=False):
    """What `model.network: photonets.nets:build` calls."""
    return PhotoNet(image_shape[0], num_classes, width, blocks, head_norm)
