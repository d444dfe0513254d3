"""Networks by name, from images to logits, with their initial weights.

>>> from pipeline.config.model import ModelSettings
>>> model = build_model(ModelSettings(network="cnn", norm="batch"), image_shape=(1, 28, 28), num_classes=10)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import nn

from models.activations import initialization_gain
from models.entrance import CentreCrop, Normalize
from models.fold import by_reason
from models.imported import NetworkError, build_imported, described
from models.networks.cnn import PlainCNN
from models.networks.imagenet import IMAGENET_NETWORKS
from models.networks.inception import Inception
from models.networks.recurrent import Recurrent, RecurrentLayer
from models.networks.resnet import ResNet
from models.networks.vision_transformer import VisionTransformer
from models.networks.wide_resnet import WideResNet
from models.norms.kept import join_statistics_of_torch
from models.norms.registry import NORMS, make_norm
from models.swap import NOTHING_REPLACED, NothingReplacedWarning, check_sizes, with_norm
from pipeline.config.import_path import KEEP, is_import_path
from pipeline.config.model import ModelSettings

# Each is called as network(settings, image_shape=(C, H, W), num_classes=..., norm=...).
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "cnn": PlainCNN,
    "inception": Inception,
    "resnet": ResNet,
    "wide_resnet": WideResNet,
    "recurrent": Recurrent,
    "vit": VisionTransformer,
    **IMAGENET_NETWORKS,
}


def build_model(
    settings: ModelSettings,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """Return the network of the settings, which turns uint8 images of shape (N, C, H, W) into float logits of shape
    (N, num_classes). With `model.input_size` it takes images of that size, too, and the centre of all others.

    For one seed the weights that two norms share start equal, so that arms of a comparison differ in the norm alone.
    A network of one's own (`build_own`) keeps the initial weights that its function gives it.

    Parameters
    ----------
    settings : ModelSettings
        The network, its norm and their options.
    image_shape : tuple of 3 ints
        C, H and W in pixels, of the images as a dataset stores them.
    num_classes : int
        The number of logits.
    mean, std : sequence of C floats, optional
        Mean and standard deviation of each channel's pixel values, scaled to [0, 1]; 0.5 and 0.25 by default.
    seed : int
        The seed of the initial weights.

    Raises
    ------
    ValueError
        No network or norm has this name (the message lists those that are known), or a setting does not fit the
        network, the norm or the images.
    """
    channels = image_shape[0]
    crop = CentreCrop(settings.centre_crop, settings.input_size) if settings.input_size else None
    if is_import_path(settings.network):
        network, _ = build_own(settings, image_shape=image_shape, num_classes=num_classes, seed=seed)
    else:
        network = _build_known(settings, settings.input_shape(image_shape), num_classes)
        _initialize(network, settings, seed)
    return nn.Sequential(Normalize(mean or [0.5] * channels, std or [0.25] * channels, crop), network)


def build_own(
    settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int, seed: int = 0
) -> tuple[nn.Module, list[str]]:
    """Return the network of an import path with the norm of the settings, from float images to logits. Its function is
    told the shape of images that `ModelSettings.input_shape` makes of the stored one.

    For one seed its function draws the same weights whatever the norm, which comes after.

    Returns
    -------
    network : Module
    remarks : list of str
        Which normalizations `with_norm` has left as they were and why, and which layers keep running statistics that
        ranks cannot join. The norm ``keep`` leaves all layers as they are.

    Raises
    ------
    NetworkError
        It cannot be imported or built (see `models.imported`), or the norm does not fit it.
    """
    path, remarks, image_shape = settings.network, [], settings.input_shape(image_shape)
    network = build_imported(path, settings.options, image_shape=image_shape, num_classes=num_classes, seed=seed)
    try:
        check_sizes(network)
    except ValueError as error:
        raise NetworkError(path, str(error)) from None
    if not network.training:
        network.train()
        remarks.append("it was built in evaluation mode, and all of it is put into training mode")
    if settings.norm != KEEP:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NothingReplacedWarning)  # it is a remark
                swapped = with_norm(network, settings, inputs=torch.zeros(2, *image_shape))
        except Exception as error:
            if error.__cause__ is None and isinstance(error, ValueError):
                raise NetworkError(path, str(error)) from error
            raise NetworkError(path, f"evaluation raised {described(error.__cause__ or error, path)}") from error
        network = swapped.network
        remarks += [f"norms that stay as they were: {by_reason(swapped.kept)}"] if swapped.kept else []
        remarks += [] if swapped.replaced else [f"nothing was replaced: {NOTHING_REPLACED}"]
    if not_joined := join_statistics_of_torch(network):
        remarks.append(f"each worker evaluates with running statistics of its own in {', '.join(not_joined)}")
    return network, remarks


def build_before_swap(settings: ModelSettings, *, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return the network of the settings as it is with batch norm: one of one's own as its function gives it, from
    float images to logits. Its weights say nothing."""
    if is_import_path(settings.network):
        return build_imported(
            settings.network, settings.options, image_shape=image_shape, num_classes=num_classes, seed=0
        )
    learned = {"norm": "batch", "norm_scale": "learned", "norm_shift": "learned"}
    defaults = {"norm_eps": ModelSettings.model_fields["norm_eps"].default}
    return _build_known(settings.model_copy(update=learned | defaults), image_shape, num_classes)


def _build_known(settings: ModelSettings, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a network of `NETWORKS`, its weights not drawn yet."""
    if settings.network not in NETWORKS:
        raise ValueError(
            f"model.network {settings.network!r} is unknown; known are {', '.join(sorted(NETWORKS))}; one of your own "
            "is written as module:function"
        )
    if settings.norm == KEEP:
        raise ValueError(
            f"model.norm {KEEP} leaves the norm layers of a network of your own as they are, and {settings.network} "
            f"has those that model.norm names: {', '.join(NORMS)}"
        )
    return NETWORKS[settings.network](
        settings, image_shape=image_shape, num_classes=num_classes, norm=make_norm(settings)
    )


@torch.no_grad()
def _initialize(network: nn.Module, settings: ModelSettings, seed: int) -> None:
    """Draw the initial weights and scale them by `model.init_scale`; biases start at 0.

    Convolutions get He initialization (He et al. 2015, equation 10), linear layers torch's own, the matrices from
    hidden state to hidden state orthogonal ones, and embeddings of positions small numbers, which are not scaled. Each
    layer draws from its own generator: biases and norms, which not every arm has, then leave the draws of the other
    layers alone.
    """
    recurrences = {layer.hidden for layer in network.modules() if isinstance(layer, RecurrentLayer)}
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.Embedding))]
    for number, layer in enumerate(layers):
        generator = torch.Generator().manual_seed(seed * 100_003 + number)
        if isinstance(layer, nn.Embedding):
            nn.init.normal_(layer.weight, std=0.02, generator=generator)
            continue
        if layer in recurrences:
            for square in layer.weight.split(layer.weight.shape[1]):
                nn.init.orthogonal_(square, generator=generator)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(
                layer.weight, nonlinearity=initialization_gain(settings.activation), generator=generator
            )
        else:
            nn.init.kaiming_uniform_(layer.weight, a=5**0.5, generator=generator)
        layer.weight.mul_(settings.init_scale)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
