"""Networks of a stranger that do what torch allows and few networks do, each told by ``kind``."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


class Odd(nn.Module):
    """A convolution, batch norm, dropout and a linear layer, with something odd."""

    def __init__(self, channels: int, num_classes: int, kind: str):
        super().__init__()
        self.kind = kind
        self.conv = nn.LazyConv2d(4, 3) if kind == "lazy" else nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = (nn.SyncBatchNorm if kind == "synchronized" else nn.BatchNorm2d)(4)
        self.act = nn.ReLU()
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(16 if kind == "views" else 4, num_classes)
        if kind == "unsaved":
            self.register_buffer("factor", torch.full((4,), 1.5), persistent=False)
        elif kind in ("made_later", "made_later_unsaved"):
            self.register_buffer("factor", None, persistent=kind == "made_later")
        elif kind == "two_names":
            self.same_norm, self.first, self.second = self.norm, nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
        elif kind == "grows":
            self.register_buffer("seen", torch.zeros(1))
        elif kind == "sometimes":
            self.extra, self.calls = nn.Linear(4, 4), 0
        elif kind == "frozen_norm":
            self.norm.eval()
        elif kind == "evaluates":
            self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(input=self.norm(input=self.conv(x)))
        if self.kind == "views":
            return self.head(F.adaptive_avg_pool2d(x, 2).view(-1, 16))
        x = x.mean((2, 3))
        if self.kind.startswith("made_later") and self.factor is None:
            self.factor = x.detach().mean(0) + 1
        if self.kind == "two_names":
            x = self.second(F.relu(self.first(x)))
        if self.kind == "grows":
            self.seen = x.detach().sum(1)
        if self.kind == "draws":
            x = F.dropout(x, 0.3, training=True)
        if self.kind == "sometimes":
            self.calls += 1
            x = x if self.calls % 2 else self.extra(x)
        return self.head(self.drop(x * getattr(self, "factor", 1)))


class Volumes(nn.Sequential):
    """Images as volumes of depth 1."""

    def __init__(self, channels: int, num_classes: int):
        layers = nn.Conv3d(channels, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.AdaptiveAvgPool3d(1)
        super().__init__(nn.Unflatten(2, (1, -1)), *layers, nn.Flatten(), nn.Linear(4, num_classes))


class Recurrent(nn.Module):
    """An LSTM over the rows of an image."""

    def __init__(self, pixels: int, num_classes: int):
        super().__init__()
        self.lstm, self.head = nn.LSTM(pixels, 4, batch_first=True), nn.Linear(4, num_classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.lstm(x.mean(1))[0][:, -1])


def build(image_shape, num_classes, kind):
    channels, _, width = image_shape
    if kind == "volumes":
        return Volumes(channels, num_classes)
    return Recurrent(width, num_classes) if kind == "lstm" else Odd(channels, num_classes, kind)
