"""A network as a user of torch writes it, who has never heard of sparknorm."""

import torch
import torch.nn as nn
import torch.nn.functional as F


class ResidualBlock(nn.Module):
    def __init__(self, cin, cout, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(cin, cout, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)  # the bias was forgotten
        self.bn2 = nn.BatchNorm2d(cout)
        self.shortcut = nn.Sequential()
        if stride != 1 or cin != cout:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, cout, 1, stride=stride, bias=False), nn.BatchNorm2d(cout))

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out)


class SqueezeExcite(nn.Module):
    """Its batch norm sees one position of a channel."""

    def __init__(self, c):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Conv2d(c, c // 2, 1, bias=False), nn.BatchNorm2d(c // 2), nn.ReLU(), nn.Conv2d(c // 2, c, 1)
        )

    def forward(self, x):
        return x * torch.sigmoid(self.fc(self.pool(x)))


class Recurrence(nn.Module):
    """One convolution and one batch norm, twice each."""

    def __init__(self, c):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        for _ in range(2):
            x = x + F.relu(self.bn(self.conv(x)))
        return x


class HandWritten(nn.Module):
    """Batch norm as a call of a function: no layer that could be replaced."""

    def __init__(self, c):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1, groups=2)
        self.gamma, self.beta = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))
        self.register_buffer("mean", torch.zeros(c))
        self.register_buffer("var", torch.ones(c))

    def forward(self, x):
        return F.relu(F.batch_norm(self.conv(x), self.mean, self.var, self.gamma, self.beta, self.training, 0.1))


class Branching(nn.Module):
    """What it computes depends on the images, so that it has no one graph."""

    def __init__(self, c):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)

    def forward(self, x):
        if x.mean() > 1e6:
            x = x / x.mean()
        return x + self.bn(self.conv(x))


class StrangersNet(nn.Module):
    def __init__(self, in_channels=3, num_classes=10, width=16):
        super().__init__()
        assert width % 4 == 0
        self.in_channels = in_channels
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.block1 = ResidualBlock(width, width)
        self.recurrence = Recurrence(width)
        self.odd = nn.Sequential(nn.Conv2d(width, width + 4, 1, bias=False), nn.BatchNorm2d(width + 4), nn.ReLU())
        self.block2 = ResidualBlock(width + 4, 2 * width, stride=2)
        self.se = SqueezeExcite(2 * width)
        self.hand = HandWritten(2 * width)
        self.branching = Branching(2 * width)
        self.norm = nn.BatchNorm2d(2 * width)  # after a sum
        self.embed = nn.Linear(2 * width, 4 * width, bias=False)
        self.embed_bn = nn.BatchNorm1d(4 * width)
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, x):
        assert x.shape[1] == self.in_channels, "wrong number of channels"
        x = self.block1(self.stem(x))
        x = self.odd(self.recurrence(x))
        x = self.hand(self.se(self.block2(x)))
        x = F.relu(self.norm(self.branching(x)))
        x = x.mean(dim=(2, 3))
        x = F.dropout(F.relu(self.embed_bn(self.embed(x))), 0.1, self.training)
        return self.head(x)


def build(image_shape, num_classes, *, width=16):
    return StrangersNet(image_shape[0], num_classes, width)
