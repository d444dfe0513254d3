"""The networks of Simonyan & Zisserman (2015, table 1), A, B, D and E, with any norm and with none.

Parameters have the names and shapes of torchvision's: those of ``vgg16`` with `model.norm` none, of ``vgg16_bn`` with
batch.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from models.activations import make_activation
from models.networks.imagenet.layers import AdaptivePool, check_images
from models.norms.registry import Norm
from pipeline.config.model import ModelSettings

# What five poolings leave of 224 pixels.
SIDE = 7


class VGG(nn.Sequential):
    """The network has five stages of 3x3 convolutions with ``width``, ``2 width``, ``4 width``, ``8 width`` and
    ``8 width`` channels, each convolution followed by norm and activation and each stage by 2x2 max pooling; then
    average pooling to 7 x 7, which changes nothing at 224 x 224, and three linear layers, the first two followed by
    activation and dropout of one half.

    Convolutions always have a bias, as published, also before a norm that replaces it: there it changes nothing.

    The input has shape (N, C, H, W) with H and W at least 32, the output (N, num_classes); both are float.

    Parameters
    ----------
    settings : ModelSettings
        Of its settings `norm`, `activation` and what belongs to the norm count here.
    image_shape : tuple of 3 ints
        C, H and W in pixels.
    num_classes : int
        The number of logits.
    norm : Norm
        The normalization; where its layers do nothing they are left out, as the published names want it.
    convolutions : sequence of 5 ints
        The number of convolutions in each stage.
    width : int
        The channels of the first stage.
    hidden : int
        The features of the first two linear layers.

    Raises
    ------
    ValueError
        The images are smaller than 32 x 32.
    """

    def __init__(
        self,
        settings: ModelSettings,
        *,
        image_shape: tuple[int, int, int],
        num_classes: int,
        norm: Norm,
        convolutions: Sequence[int],
        width: int = 64,
        hidden: int = 4096,
    ):
        super().__init__()
        # The last norm is before the fifth pooling, so that it sees at least 2 x 2 positions.
        check_images(settings, image_shape, norm, one_position_up_to=None)
        channels, *sides = image_shape
        layers: list[nn.Module] = []
        for stage, count in enumerate(convolutions):
            outputs = width * min(2**stage, 8)
            for _ in range(count):
                layers += [norm.conv(channels, outputs, 3, padding=1), norm.layer(outputs)]
                layers.append(make_activation(settings.activation))
                channels = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*(layer for layer in layers if not isinstance(layer, nn.Identity)))
        height, width_left = (side // 2 ** len(convolutions) for side in sides)
        self.avgpool = nn.Identity() if height == width_left == SIDE else AdaptivePool(height, width_left, SIDE)
        self.flatten = nn.Flatten()
        self.classifier = nn.Sequential(
            nn.Linear(channels * SIDE**2, hidden),
            make_activation(settings.activation),
            nn.Dropout(0.5),
            nn.Linear(hidden, hidden),
            make_activation(settings.activation),
            nn.Dropout(0.5),
            nn.Linear(hidden, num_classes),
        )
