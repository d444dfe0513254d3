"""Networks by name. Code for a single device: no ranks, no Spark.

>>> from pipeline.config.training import ModelSettings
>>> model = build_model(ModelSettings(network="cnn", norm="batch"), image_shape=(1, 28, 28), num_classes=10)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from models.activations import gain_of
from models.networks.cnn import PlainCNN
from models.networks.inception import Inception
from models.networks.recurrent import Recurrent, RecurrentLayer
from models.networks.resnet import ResNet
from models.networks.vision_transformer import VisionTransformer
from models.networks.wide_resnet import WideResNet
from models.norms.registry import make_norm
from pipeline.config.training import ModelSettings

# Each is called as network(settings, image_shape=(C, H, W), num_classes=..., norm=...).
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cnn": PlainCNN,
    "inception": Inception,
    "resnet": ResNet,
    "wide_resnet": WideResNet,
    "recurrent": Recurrent,
    "vit": VisionTransformer,
}


class Normalize(nn.Module):
    """uint8 images (N, C, H, W) -> float images with the training split's mean 0 and deviation 1, per channel.

    mean, std : C numbers each, of pixel values scaled to [0, 1], as the manifest states them
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        scale = torch.tensor([1 / (255 * max(s, 1e-6)) for s in std])
        self.register_buffer("scale", scale.view(1, -1, 1, 1))
        self.register_buffer("shift", (torch.tensor(list(mean)) * 255 * scale).view(1, -1, 1, 1))
        self.scale: torch.Tensor
        self.shift: torch.Tensor

    def forward(self, images_nchw: torch.Tensor) -> torch.Tensor:
        return images_nchw.to(self.scale.dtype) * self.scale - self.shift


def build_model(
    settings: ModelSettings,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """The network of the settings, from uint8 images (N, C, H, W) to float logits (N, num_classes).

    For one seed the weights that two norms share start equal, so that arms of a comparison differ in the norm alone.

    Raises
    ------
    ValueError
        The network or the norm is not registered (those that are get listed), or a setting does not fit the network,
        the norm or the images.
    """
    if settings.network not in NETWORKS:
        raise ValueError(f"model.network {settings.network!r} is unknown; known are {', '.join(sorted(NETWORKS))}")
    channels = image_shape[0]
    network = NETWORKS[settings.network](
        settings, image_shape=image_shape, num_classes=num_classes, norm=make_norm(settings)
    )
    _initialize(network, settings, seed)
    return nn.Sequential(Normalize(mean or [0.5] * channels, std or [0.25] * channels), network)


@torch.no_grad()
def _initialize(network: nn.Module, settings: ModelSettings, seed: int) -> None:
    """He initialization (He et al. 2015, equation 10) of convolutions, torch's own of linear layers, orthogonal
    matrices from hidden state to hidden state, all times `model.init_scale`; zero biases; small positions.

    Each layer draws from a generator of its own: biases and norms, which not every arm has, then leave the draws of
    the other layers alone.
    """
    from_hidden = {layer.hidden for layer in network.modules() if isinstance(layer, RecurrentLayer)}
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    for number, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
            continue
        if layer in from_hidden:
            for square in layer.weight.split(layer.weight.shape[1]):
                nn.init.orthogonal_(square, generator=generator)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity=gain_of(settings.activation), generator=generator)
        else:
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
        layer.weight.mul_(settings.init_scale)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
