"""What of the settings two trainings, studies or datasets must share to be the same: the input of their digests.

A version that adds a setting must find what versions before it have begun: a setting at the value that does what they
did is no part of an identity. That value is written down here and not the setting's default, which may change later.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from pipeline.config.dotted import Tree

# Settings that were added after 0.7.0: the dotted name, and the JSON value with which everything is as it was before.
# An entry is never changed nor taken out. A section that is added is one entry with all its values; what is added to
# it later still has an entry of its own.
NEUTRAL: Mapping[str, Any] = {
    "train.final_network": "last",
    "train.select_on": "validation",
    "compare.checkpoint": "last",
    "reader.gpu_bytes": 1 << 30,
    "train.cuda_graphs": False,
    "train.deterministic": False,
    "dataset.source.extensions": [".bmp", ".jpeg", ".jpg", ".png", ".webp"],
    # 0.7.0 had no limit. What is larger and came in with it stays; almost nothing was: 50 million pixels are 200 MB.
    "dataset.source.max_image_bytes": 256 << 20,
    "model.options": {},
    "model.input_size": None,
    "model.centre_crop": None,
    "train.augment.crop_scale": None,
    "train.augment.crop_ratio": 4 / 3,
    "train.augment.brightness": 0.0,
    "train.augment.contrast": 0.0,
    "train.augment.saturation": 0.0,
    "train.augment.mixup": 0.0,
    "train.augment.cutmix": 0.0,
    "train.augment.mix_probability": 1.0,
    "train.gradient_checkpointing": False,
    "model.weights": None,
    "model.weights_sha256": None,
    "model.freeze": [],
    "model.mean": None,
    "model.std": None,
    "train.optimizer": "sgd",
    "train.head_learning_rate": None,
    "train.beta2": 0.999,
    "train.optimizer_eps": None,
    "train.trust_coefficient": 0.001,
    "train.clip_norm": None,
    "train.clip_adaptive": None,
    "dataset.image.keep_jpeg": False,
    "dataset.image.decode": "exact",
    "dataset.image.decode_margin": 2.0,  # decides nothing where decoding is exact
    "reader.decode_in": "processes",  # versions before decoded in threads: the same pixels
}


def identity_of(name: str, section: BaseModel, *, exclude: Any = None) -> Tree:
    """Return the values of a section as nested dicts of JSON values, without those of `NEUTRAL`.

    Parameters
    ----------
    name : of the section, with which the dotted names of its settings begin: ``train``
    exclude : settings that decide nothing, as ``model_dump`` takes them
    """
    return _without_neutral(section.model_dump(mode="json", exclude=exclude), name)


def _without_neutral(tree: Tree, prefix: str) -> Tree:
    kept: Tree = {}
    for key, value in tree.items():
        name = f"{prefix}.{key}"
        left = _without_neutral(value, name) if isinstance(value, dict) else value
        if name not in NEUTRAL or left != NEUTRAL[name]:
            kept[key] = left
    return kept
