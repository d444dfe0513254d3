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
        self.conv = nn.Conv2d(channels, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(4, num_classes)
        if kind == "unsaved":
            self.register_buffer("factor", torch.full((4,), 1.5), persistent=False)
        elif kind in ("made_later", "made_later_unsaved"):
            self.register_buffer("factor", None, persistent=kind == "made_later")
        elif kind == "two_names":
            self.same_norm, self.first, self.second = self.norm, nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        if self.kind.startswith("made_later") and self.factor is None:
            self.factor = x.detach().mean(0) + 1
        if self.kind == "two_names":
            x = self.second(F.relu(self.first(x)))
        return self.head(self.drop(x * getattr(self, "factor", 1)))


def build(image_shape, num_classes, kind):
    return Odd(image_shape[0], num_classes, kind)
