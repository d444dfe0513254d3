"""Networks of all kinds for images of 8 x 8 pixels, small enough for milliseconds."""

import numpy as np
import torch
from torch import nn

from models import build_model
from pipeline.config.model import ModelSettings

DEPTHS = {"cnn": 3, "inception": 3, "resnet": 8, "wide_resnet": 10, "recurrent": 1, "vit": 2}
SMALL = tuple(DEPTHS)  # the networks for small images; for the others see `small_imagenet`
KINDS = {
    **{name: {"network": name, "depth": depth} for name, depth in DEPTHS.items()},
    "bottleneck": {"network": "resnet", "depth": 11, "block": "bottleneck"},
    "gru": {"network": "recurrent", "depth": 2, "cell": "gru"},
    "post": {"network": "vit", "depth": 2, "norm_place": "post"},
}


def settings_of(kind, norm="batch", **changes):
    return ModelSettings(**{**KINDS[kind], "norm": norm, "width": 8, "norm_groups": 2, "heads": 2, **changes})


def make(kind, norm="batch", *, seed=0, **changes):
    return build_model(settings_of(kind, norm, **changes), image_shape=(3, 8, 8), num_classes=5, seed=seed)


def randomized(module, seed=0):
    """In float64, all parameters drawn anew: no scale is 1 and no shift 0."""
    random = np.random.default_rng(seed)
    for parameter in module.double().parameters():
        parameter.data.copy_(torch.from_numpy(random.normal(size=parameter.shape)))
    return module


def number(tensor):
    return tensor.detach().numpy()


def widths_of(kind, depth, **changes):
    layers = make(kind, depth=depth, **changes).named_modules()
    return [m.out_channels for name, m in layers if isinstance(m, nn.Conv2d) and "shortcut" not in name]
