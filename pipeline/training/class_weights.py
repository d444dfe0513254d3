"""The weights of the classes in the training loss (``train.class_weights``)."""

from __future__ import annotations

import numpy as np
import torch

from pipeline.config.training import TrainSettings
from pipeline.data.manifest import Manifest


def weights_of(train: TrainSettings, manifest: Manifest) -> np.ndarray | None:
    """The weight of each class, scaled so that the mean weight of the images that are trained on is 1.

    With weights w and the shares q of the classes among these images (those of the training split, or equal ones where
    ``train.sampling`` is balanced) class c weighs w_c / sum_k(q_k w_k). A batch's loss is the mean of weight times
    cross-entropy over its images. In the mean over batches its gradient is that of the weighted mean of the whole
    split. To divide by the sum of a batch's own weights, as torch does, would make it depend on which rank has which
    images, and favours small classes less in batches that have many of them. The learning rate needs no change, since
    the mean weight is 1.

    ``balanced`` is w_c = rows / (classes * rows of c), over the classes that have rows (King & Zeng 2001,
    weighting, for equal shares; as scikit-learn's `compute_class_weight`), and 1 for a class without.

    Returns
    -------
    float64 array of shape (classes,); None where all weigh the same, ``none``.

    Raises
    ------
    ValueError
        A class is not one of the dataset's, or all classes that have rows weigh 0.
    """
    counts = np.array(manifest.split("train").label_counts, dtype=np.float64)
    present = counts > 0
    if train.class_weights == "none":
        return None
    weights = np.ones(len(counts))
    if train.class_weights == "balanced":
        weights[present] = counts.sum() / (present.sum() * counts[present])
    else:
        assert not isinstance(train.class_weights, str)
        for name, weight in train.class_weights.items():
            weights[_number_of(name, manifest)] = weight
    drawn = present.astype(np.float64) if train.sampling == "balanced" else counts
    mean = (weights * drawn).sum() / drawn.sum()
    if not mean:
        raise ValueError(
            f"train.class_weights {train.class_weights}: every class that has training images in dataset "
            f"{manifest.name} weighs 0; at least one needs a weight"
        )
    return weights / mean


def class_weights(train: TrainSettings, manifest: Manifest, device: torch.device) -> torch.Tensor | None:
    """`weights_of` as float64 (classes,) on a device; on one without float64, float32."""
    weights = weights_of(train, manifest)
    if weights is None:
        return None
    return torch.as_tensor(weights, dtype=torch.float32 if device.type == "mps" else torch.float64).to(device)


def _number_of(name: str, manifest: Manifest) -> int:
    if name in manifest.classes:
        return manifest.classes.index(name)
    if name.isdecimal() and int(name) < len(manifest.classes):
        return int(name)
    raise ValueError(
        f"train.class_weights names {name!r}, which is no class of dataset {manifest.name}: use names of "
        f"{', '.join(manifest.classes[:20])}{', ...' if len(manifest.classes) > 20 else ''}, or numbers below "
        f"{len(manifest.classes)}"
    )
