"""The residual network for small images of He et al. (2016, section 4.2), with any norm."""

from __future__ import annotations

import torch
from torch import nn

from models.activations import make_activation
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

STAGES = 3
# 512 bits of float32.
_FLOATS_OF_A_VECTOR = 16


def convolution(norm: Norm, inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    """Return the convolution before a norm; with a stride of 1 it keeps the height and width of the image."""
    return norm.conv(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=not norm.replaces_bias)


def blocks_per_stage(settings: ModelSettings, name: str, step: int, rest: int) -> int:
    """Return n of ``depth = step * n + rest``.

    Raises
    ------
    ValueError
        There is no such n; the message names the network as ``name`` and lists some depths.
    """
    blocks, remainder = divmod(settings.depth - rest, step)
    if blocks < 1 or remainder:
        depths = ", ".join(str(step * n + rest) for n in (1, 2, 3, 4, 5, 6, 7, 9, 18))
        raise ValueError(f"model.depth {settings.depth}: {name} has {step}n + {rest} layers: {depths}")
    return blocks


def check_positions(settings: ModelSettings, image_shape: tuple[int, int, int], norm: Norm) -> None:
    """Check that the last stage leaves as many positions of a channel as the norm needs.

    Raises
    ------
    ValueError
        Two strides leave one position, and the norm needs several.
    """
    if norm.needs_positions and max(image_shape[1:]) <= 4:
        raise ValueError(
            f"model.norm {settings.norm} needs several positions, and the {settings.network} reduces images of "
            f"{image_shape[1]} x {image_shape[2]} to one: use another norm, or a dataset.image.shape above 4 x 4"
        )


def pixels_apart(inputs: int, stride: int) -> int:
    """Return how far apart the pixels are that a shortcut is given; its own stride is the rest.

    A 1x1 convolution with a stride is the same as one without on every ``stride``-th pixel. With fewer channels than a
    vector of AVX-512 has floats, the backward pass of the former writes beyond its memory on CPU, in channels-last
    layout (oneDNN in torch up to 2.13), and ends the process, or worse does not.
    """
    return stride if inputs < _FLOATS_OF_A_VECTOR else 1


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Module:
    """Return the identity, or where shapes change a 1x1 convolution and a norm (He et al. 2016, option B)."""
    if stride == 1 and inputs == outputs:
        return nn.Identity()
    rest = stride // pixels_apart(inputs, stride)
    return nn.Sequential(convolution(norm, inputs, outputs, 1, rest), norm.layer(outputs))


def last_norm(channels: int, norm: Norm, settings: ModelSettings) -> nn.Module:
    """Return the norm of a branch's end. A scale of 0 lets a block start as its shortcut (Goyal et al. 2017, section
    5.1)."""
    if settings.zero_init and settings.norm_scale == "learned":
        return norm.layer(channels, scale_init=0.0)
    return norm.layer(channels)


def every(x_nchw: torch.Tensor, apart: int) -> torch.Tensor:
    """Return the pixels that are so far apart, in rows and columns, the first included."""
    return x_nchw if apart == 1 else x_nchw[:, :, ::apart, ::apart]


def _sum(shortcut: torch.Tensor, branch: torch.Tensor) -> torch.Tensor:
    return torch.add(shortcut, branch)  # not +, which a trace does not tell from +=: see `models.fold`


class BasicBlock(nn.Module):
    """The block computes ``activation(shortcut(x) + norm(conv(activation(norm(conv(x))))))``, both convolutions 3x3.

    The input has shape (N, inputs, H, W), the output (N, channels, ceil(H / stride), ceil(W / stride)).

    Attributes
    ----------
    layers : int
        The number of convolutions in a block.
    expansion : int
        The number of output channels for each of ``channels``.
    """

    layers, expansion = 2, 1

    def __init__(self, inputs: int, channels: int, stride: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        self.conv1, self.norm1 = convolution(norm, inputs, channels, 3, stride), norm.layer(channels)
        self.conv2, self.norm2 = convolution(norm, channels, channels, 3), last_norm(channels, norm, settings)
        self.shortcut, self.apart = _shortcut(inputs, channels, stride, norm), pixels_apart(inputs, stride)
        self.activation1, self.activation2 = (make_activation(settings.activation) for _ in range(2))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        inner = self.activation1(self.norm1(self.conv1(x_nchw)))
        return self.activation2(_sum(self.shortcut(every(x_nchw, self.apart)), self.norm2(self.conv2(inner))))


class Bottleneck(nn.Module):
    """The block is a `BasicBlock` with three convolutions (He et al. 2016, figure 5): 1x1 to ``channels``, 3x3 with the
    stride, and 1x1 to ``4 channels``.

    The input has shape (N, inputs, H, W), the output (N, 4 channels, ceil(H / stride), ceil(W / stride)).
    """

    layers, expansion = 3, 4

    def __init__(self, inputs: int, channels: int, stride: int, norm: Norm, settings: ModelSettings):
        super().__init__()
        outputs = channels * self.expansion
        self.conv1, self.norm1 = convolution(norm, inputs, channels, 1), norm.layer(channels)
        self.conv2, self.norm2 = convolution(norm, channels, channels, 3, stride), norm.layer(channels)
        self.conv3, self.norm3 = convolution(norm, channels, outputs, 1), last_norm(outputs, norm, settings)
        self.shortcut, self.apart = _shortcut(inputs, outputs, stride, norm), pixels_apart(inputs, stride)
        self.activation1, self.activation2, self.activation3 = (make_activation(settings.activation) for _ in range(3))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        inner = self.activation1(self.norm1(self.conv1(x_nchw)))
        inner = self.activation2(self.norm2(self.conv2(inner)))
        return self.activation3(_sum(self.shortcut(every(x_nchw, self.apart)), self.norm3(self.conv3(inner))))


BLOCKS: dict[str, type[BasicBlock] | type[Bottleneck]] = {"basic": BasicBlock, "bottleneck": Bottleneck}


class ResNet(nn.Module):
    """The network has ``depth`` = 6n + 2 layers: a 3x3 convolution, then n blocks at each of three resolutions with
    ``width``, ``2 width`` and ``4 width`` channels, global average pooling, and a linear layer. With bottleneck blocks
    it has 9n + 2 layers, and the stages have four times as many output channels.

    The input has shape (N, C, H, W), the output (N, num_classes); both are float.

    Raises
    ------
    ValueError
        There is no resnet of this depth, or the images are too small for the norm.
    """

    def __init__(self, settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int, norm: Norm):
        super().__init__()
        block, width = BLOCKS[settings.block], settings.width
        per_stage = blocks_per_stage(settings, f"a resnet of {settings.block} blocks", STAGES * block.layers, 2)
        check_positions(settings, image_shape, norm)
        stem = convolution(norm, image_shape[0], width, 3)
        self.stem = nn.Sequential(stem, norm.layer(width), make_activation(settings.activation))
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(STAGES):
            for number in range(per_stage):
                stride = 2 if stage and not number else 1
                blocks.append(block(inputs, width * 2**stage, stride, norm, settings))
                inputs = width * 2**stage * block.expansion
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(inputs, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.blocks(self.stem(x_nchw)).mean(dim=(2, 3)))
