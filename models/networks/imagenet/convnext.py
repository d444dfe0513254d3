"""ConvNeXt (Liu et al. 2022), whose own norm is layer norm at each position, with any norm.

Parameters have the names and shapes of torchvision's, whose weight files load with `model.norm` layer; they were
trained with `model.norm_eps` 1e-6.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models.activations import make_activation
from models.networks.imagenet.layers import REDUCTION, StochasticDepth, check_images
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

# The initial factor on each channel of a block (Touvron et al. 2021; Liu et al. 2022, appendix A.1).
LAYER_SCALE = 1e-6
# The probability that the last block is left out for a sample; those before it go up evenly from 0.
DROP_PROBABILITY = 0.1


class Block(nn.Module):
    """The block computes ``x + scale * linear(activation(linear(norm(conv(x)))))`` (Liu et al. 2022, figure 4): a 7x7
    convolution of each channel by itself, linear layers to ``4 channels`` and back at each position, and a learned
    factor for each channel. Stochastic depth leaves the branch out for some samples in training.

    Input and output have shape (N, channels, H, W).
    """

    def __init__(self, channels: int, drop_probability: float, norm: Norm, settings: ModelSettings):
        super().__init__()
        self.layer_scale = nn.Parameter(torch.full((channels, 1, 1), LAYER_SCALE))
        # The convolution has a bias with any norm, as published.
        self.block = nn.ModuleDict(
            {
                "0": norm.conv(channels, channels, 7, padding=3, groups=channels),
                "2": norm.at_positions(channels),
                "3": nn.Linear(channels, 4 * channels),
                "4": make_activation(settings.activation, default="gelu"),
                "5": nn.Linear(4 * channels, channels),
            }
        )
        self.stochastic_depth = StochasticDepth(drop_probability)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        inner = self.block["2"](self.block["0"](x_nchw)).permute(0, 2, 3, 1)
        inner = self.block["5"](self.block["4"](self.block["3"](inner))).permute(0, 3, 1, 2)
        return x_nchw + self.stochastic_depth(self.layer_scale * inner)


class ConvNeXt(nn.Module):
    """The network is a 4x4 convolution with stride 4 and a norm, four stages of blocks with a norm and a 2x2
    convolution with stride 2 between them, global average pooling, a norm, and a linear layer (Liu et al. 2022, table
    9). Its layer and group norms take their statistics over the channels at each position by itself.

    After the pooling one position is left: there a norm that needs several, such as instance norm, is left out.

    The input has shape (N, C, H, W) with H and W at least 32, the output (N, num_classes); both are float.

    Parameters
    ----------
    settings : ModelSettings
        Of its settings `norm`, `activation` (null: gelu) and what belongs to the norm count here.
    image_shape : tuple of 3 ints
        C, H and W in pixels.
    num_classes : int
        The number of logits.
    norm : Norm
        The normalization.
    blocks, widths : sequence of 4 ints
        The number of blocks and the channels of each stage.

    Raises
    ------
    ValueError
        The images are too small for the network or the norm.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        norm: Norm,
        blocks: Sequence[int] = (3, 3, 9, 3),
        widths: Sequence[int] = (96, 192, 384, 768),
    ):
        super().__init__()
        check_images(settings, image_shape, norm, one_position_up_to=2 * REDUCTION - 1)
        last_block = max(1, sum(blocks) - 1)
        probabilities = (DROP_PROBABILITY * number / last_block for number in range(sum(blocks)))
        stem = norm.conv(image_shape[0], widths[0], 4, stride=4)
        layers: list[nn.Module] = [nn.Sequential(stem, norm.at_positions(widths[0]))]
        for stage, (count, channels) in enumerate(zip(blocks, widths, strict=True)):
            if stage:
                before = widths[stage - 1]
                layers.append(nn.Sequential(norm.at_positions(before), nn.Conv2d(before, channels, 2, stride=2)))
            layers.append(nn.Sequential(*(Block(channels, next(probabilities), norm, settings) for _ in range(count))))
        self.features = nn.Sequential(*layers)
        last = nn.Identity() if norm.needs_positions else norm.at_positions(widths[-1])
        self.classifier = nn.Sequential(last, nn.Flatten(), nn.Linear(widths[-1], num_classes))

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x_nchw).mean(dim=(2, 3), keepdim=True))
