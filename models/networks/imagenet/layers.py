"""What the networks for ImageNet share: the sizes of images that they take, and layers."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

# All of these networks halve the images five times.
REDUCTION = 32


def check_images(
    settings: ModelSettings, image_shape: tuple[int, int, int], norm: Norm, *, one_position_up_to: int | None
) -> None:
    """Check that images are as large as a network that halves them five times needs, with this norm.

    Parameters
    ----------
    settings : ModelSettings
        The settings, whose names the message has.
    image_shape : tuple of 3 ints
        C, H and W in pixels.
    norm : Norm
        The normalization.
    one_position_up_to : int or None
        The longest side, in pixels, of images of which the last norm sees one position; None where it always sees
        several.

    Raises
    ------
    ValueError
        A side is shorter than 32 pixels, or the norm needs several positions and would get one.
    """
    height, width = image_shape[1:]
    if min(height, width) < REDUCTION:
        raise ValueError(
            f"images of {height} x {width}: {settings.network} halves them 5 times, so dataset.image.shape has to be "
            f"at least {REDUCTION} x {REDUCTION} (it was made for 224 x 224)"
        )
    if one_position_up_to and norm.needs_positions and max(height, width) <= one_position_up_to:
        raise ValueError(
            f"model.norm {settings.norm} needs several positions, and {settings.network} reduces images of "
            f"{height} x {width} to one: use another norm, or a dataset.image.shape with a side above "
            f"{one_position_up_to}"
        )


class AdaptivePool(nn.Module):
    """The layer averages an (N, C, H, W) input over overlapping windows, so that (N, C, side, side) are left.

    Window i of an axis of n pixels reaches from ``floor(i n / side)`` up to ``ceil((i + 1) n / side)``, as in torch's
    `AdaptiveAvgPool2d`. It is two products with matrices: torch's own layer has a backward pass on CUDA that is refused
    where the same bits are wanted every time (`train.deterministic`).

    Parameters
    ----------
    height, width : int
        H and W.
    side : int
        The height and width that are left.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(self, height: int, width: int, side: int):
        super().__init__()
        self.register_buffer("rows", _windows(height, side), persistent=False)
        self.register_buffer("columns", _windows(width, side).T.contiguous(), persistent=False)

    def forward(self, x_nchw: torch.Tensor) -> torch.Tensor:
        return self.rows @ x_nchw @ self.columns


def _windows(pixels: int, side: int) -> torch.Tensor:
    """Return the weight of each pixel in each window, of shape (side, pixels)."""
    weights = torch.zeros(side, pixels)
    for window in range(side):
        first, end = window * pixels // side, -(-(window + 1) * pixels // side)
        weights[window, first:end] = 1 / (end - first)
    return weights


class StochasticDepth(nn.Module):
    """The layer sets all numbers of a sample to 0 with the given probability, and divides those of the other samples by
    the probability to be kept (Huang et al. 2016, section 3); in evaluation it does nothing.

    Input and output have shape (N, ...).

    Parameters
    ----------
    probability : float
        The probability of a sample to be dropped, at least 0 and below 1.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.probability:
            return x
        return x * F.dropout(x.new_ones(x.shape[0], *(1,) * (x.ndim - 1)), self.probability)

    def extra_repr(self) -> str:
        return f"{self.probability:.3g}"
