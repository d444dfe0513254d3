"""A small vision transformer (Dosovitskiy et al. 2021), with any norm."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.activations import make_activation
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

# Features inside the multilayer perceptron, for each of the width (Dosovitskiy et al. 2021, table 1).
MLP_RATIO = 4


class Attention(nn.Module):
    """The layer is multi-head self-attention (Vaswani et al. 2017, section 3.2): ``softmax(Q K^T / sqrt(D / heads)) V``
    in each head.

    Input and output have shape (N, T, D).
    """

    def __init__(self, width: int, heads: int, norm: Norm):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.project = norm.linear(width, width, bias=not norm.replaces_bias)

    def forward(self, x_ntd: torch.Tensor) -> torch.Tensor:
        # (N, T, 3 D) -> three of (N, heads, T, D / heads)
        query, key, value = self.qkv(x_ntd).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.project(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """The block has two branches, attention and a multilayer perceptron, each of which is added to its own input.

    `model.norm_place` says where the norms go: ``pre`` computes ``x + branch(norm(x))`` (Dosovitskiy et al. 2021,
    equations 2 and 3), ``post`` computes ``norm(x + branch(x))`` (Vaswani et al. 2017, section 3.1). The last layer of
    a branch is the one before a norm, through the sum, so its class is the one that the norm asks for.

    Input and output have shape (N, T, D).
    """

    def __init__(self, settings: ModelSettings, norm: Norm):
        super().__init__()
        width = settings.width
        self.pre = settings.norm_place == "pre"
        self.norm1, self.norm2 = norm.tokens(width), norm.tokens(width)
        self.attention = Attention(width, settings.heads, norm)
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_RATIO * width),
            make_activation(settings.activation, default="gelu"),
            norm.linear(MLP_RATIO * width, width, bias=not norm.replaces_bias),
        )

    def forward(self, x_ntd: torch.Tensor) -> torch.Tensor:
        if self.pre:
            x_ntd = x_ntd + self.attention(self.norm1(x_ntd))
            return x_ntd + self.mlp(self.norm2(x_ntd))
        x_ntd = self.norm1(x_ntd + self.attention(x_ntd))
        return self.norm2(x_ntd + self.mlp(x_ntd))


class VisionTransformer(nn.Module):
    """The network turns patches of ``patch`` x ``patch`` pixels into tokens of ``width`` features, by a linear map and
    a learned position (Dosovitskiy et al. 2021, equation 1). ``depth`` blocks follow, then with norms before the
    branches a last norm (equation 4), the mean over tokens in place of a class token, and a linear layer.

    After a norm that needs positions, such as instance norm, the mean over tokens is the same for every image, so the
    norm just before the mean is left out.

    The input has shape (N, C, H, W), the output (N, num_classes); both are float.

    Raises
    ------
    ValueError
        The patches do not fit the image, or the heads the width; or the whole image is one patch, and the norm needs
        several positions.
    """

    def __init__(self, settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int, norm: Norm):
        super().__init__()
        channels, height, width = image_shape
        _check_shapes(settings, height, width, norm)
        side, features = settings.patch, settings.width
        self.patches = norm.conv(channels, features, side, stride=side, bias=not norm.replaces_bias)
        self.positions = nn.Embedding((height // side) * (width // side), features)
        self.blocks = nn.Sequential(*(Block(settings, norm) for _ in range(settings.depth)))
        last = nn.Identity() if norm.needs_positions else norm.tokens(features)
        if settings.norm_place == "pre":
            self.norm = last
        else:
            self.norm, self.blocks[-1].norm2 = nn.Identity(), last
        self.classifier = nn.Linear(features, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        tokens_ntd = self.patches(x_nchw).flatten(2).transpose(1, 2) + self.positions.weight
        return self.classifier(self.norm(self.blocks(tokens_ntd)).mean(dim=1))


def _check_shapes(settings: ModelSettings, height: int, width: int, norm: Norm) -> None:
    if height % settings.patch or width % settings.patch:
        fits = [side for side in range(1, min(height, width) + 1) if height % side == width % side == 0]
        raise ValueError(
            f"model.patch {settings.patch} does not cut images of {height} x {width} into whole patches: "
            f"use one of {fits}"
        )
    if norm.needs_positions and height == width == settings.patch:
        raise ValueError(
            f"model.norm {settings.norm} needs several positions, and model.patch {settings.patch} makes one token of "
            f"images of {height} x {width}: use another norm, or a smaller patch"
        )
    if settings.width % settings.heads:
        fits = [heads for heads in range(1, settings.width + 1) if settings.width % heads == 0]
        raise ValueError(
            f"model.heads {settings.heads} does not divide model.width {settings.width}: use one of {fits}"
        )
