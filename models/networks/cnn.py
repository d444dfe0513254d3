"""A plain CNN without shortcuts: convolution, norm, activation, as deep and wide as the settings say."""

from __future__ import annotations

import torch
from torch import nn

from models.activations import make_activation
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

STAGES = 3


class PlainCNN(nn.Module):
    """The network has ``depth`` 3x3 convolutions in three stages of ``width``, ``2 width`` and ``4 width`` channels.

    Each stage ends with 2x2 max pooling; global average pooling and a linear layer follow. The convolutions are spread
    evenly over the stages, and the later stages, which are cheaper, take what is left over. With sigmoids it makes the
    comparison of Ioffe & Szegedy (2015, sections 4.1 and 4.2.2): they saturate unless a norm holds them back.

    The input has shape (N, C, H, W) with H and W at least 8, the output (N, num_classes); both are float.

    Raises
    ------
    ValueError
        There are fewer convolutions than stages, or three poolings leave nothing of the images.
    """

    def __init__(self, settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int, norm: Norm):
        super().__init__()
        channels, height, width = image_shape
        if settings.depth < STAGES:
            raise ValueError(
                f"model.depth {settings.depth}: the cnn has {STAGES} stages, so at least {STAGES} convolutions"
            )
        if min(height, width) < 2**STAGES:
            raise ValueError(
                f"images of {height} x {width}: the cnn halves them {STAGES} times, so dataset.image.shape has to be "
                f"at least {2**STAGES} x {2**STAGES}"
            )
        layers: list[nn.Module] = []
        for stage in range(STAGES):
            for _ in range((settings.depth + stage) // STAGES):
                outputs = settings.width * 2**stage
                layers += [
                    norm.conv(channels, outputs, 3, padding=1, bias=not norm.replaces_bias),
                    norm.layer(outputs),
                    make_activation(settings.activation),
                ]
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(x_nchw).mean(dim=(2, 3)))
