"""A small network of Inception modules for small images, after the one of Ioffe & Szegedy (2015, figure 5)."""

from __future__ import annotations

import torch
import torch.fx
from torch import nn

from models.activations import make_activation
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

STAGES = 3


class ConvUnit(nn.Sequential):
    """The unit computes ``activation(norm(conv(x)))`` and keeps the height and width of the image."""

    def __init__(self, inputs: int, outputs: int, kernel: int, norm: Norm, activation: str | None):
        super().__init__(
            norm.conv(inputs, outputs, kernel, padding=kernel // 2, bias=not norm.replaces_bias),
            norm.layer(outputs),
            make_activation(activation),
        )


@torch.fx.wrap  # a condition on the device is not for tracing
def contiguous_on_cuda(x_nchw: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself on the CPU, and on CUDA one whose memory is in the order of its axes."""
    return x_nchw.contiguous() if x_nchw.is_cuda else x_nchw


class AveragePool(nn.AvgPool2d):
    """The mean over 3 x 3 pixels, those beyond the border not counted, at every pixel of an (N, C, H, W) input.

    On CUDA the input becomes contiguous first: with channels_last and padding torch's backward pass gives wrong
    gradients (seen with torch 2.11 on an H100; pytorch issue 188344). `tests/cuda` compares them with the CPU's.
    """

    def __init__(self) -> None:
        super().__init__(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return super().forward(contiguous_on_cuda(x_nchw))


class InceptionModule(nn.Module):
    """The module concatenates four branches of ``outputs`` channels each: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3 (in place of
    GoogLeNet's 5x5); average pooling, 1x1.

    The input has shape (N, inputs, H, W), the output (N, 4 outputs, H, W).
    """

    def __init__(self, inputs: int, outputs: int, norm: Norm, activation: str | None):
        super().__init__()

        def chain(*kernels: int) -> list[nn.Module]:
            widths = [inputs, *[outputs] * len(kernels)]
            return [ConvUnit(widths[i], outputs, kernel, norm, activation) for i, kernel in enumerate(kernels)]

        pool = AveragePool()
        branches = [chain(1), chain(1, 3), chain(1, 3, 3), [pool, *chain(1)]]
        self.branches = nn.ModuleList(nn.Sequential(*branch) for branch in branches)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return torch.cat([branch(x_nchw) for branch in self.branches], dim=1)


class Inception(nn.Module):
    """The network is a 3x3 convolution, then ``depth`` Inception modules in three stages with branches of ``width``,
    ``2 width`` and ``4 width`` channels, 2x2 max pooling between stages, global average pooling, and a linear layer.

    The input has shape (N, C, H, W) with H and W at least 8, the output (N, num_classes); both are float.

    Raises
    ------
    ValueError
        There are fewer modules than stages, or the images are too small for the poolings.
    """

    def __init__(self, settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int, norm: Norm):
        super().__init__()
        if settings.depth < STAGES:
            raise ValueError(
                f"model.depth {settings.depth}: the inception network has {STAGES} stages, so at least {STAGES} modules"
            )
        if min(image_shape[1:]) < 2**STAGES:
            raise ValueError(
                f"images of {image_shape[1]} x {image_shape[2]}: the inception network halves them twice and looks at "
                f"neighbours, so dataset.image.shape has to be at least {2**STAGES} x {2**STAGES}"
            )
        self.stem = ConvUnit(image_shape[0], settings.width, 3, norm, settings.activation)
        layers: list[nn.Module] = []
        channels = settings.width
        for stage in range(STAGES):
            if stage:
                layers.append(nn.MaxPool2d(2))
            for _ in range((settings.depth + stage) // STAGES):
                outputs = settings.width * 2**stage
                layers.append(InceptionModule(channels, outputs, norm, settings.activation))
                channels = 4 * outputs
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.features(self.stem(x_nchw)).mean(dim=(2, 3)))
