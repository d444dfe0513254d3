"""A trained network becomes a model folder: folded, compared with what was trained, and only then published."""

from __future__ import annotations

import importlib.metadata
import logging
import platform
from contextlib import suppress

from pipeline import __version__, storage
from pipeline.config.settings import Settings
from pipeline.data import Manifest
from pipeline.ingest.images import image_spec
from pipeline.serving.checked import reference_of, write_checked
from pipeline.serving.exporting import COMPARED_IMAGES, fold_norms
from pipeline.serving.result import ComparedImages, DatasetOrigin, FoldedNorms
from pipeline.serving.served import FILE, NETWORK_FILE, ServedImage, ServedModel
from pipeline.serving.trained import Trained, first_images

log = logging.getLogger(__name__)

_PACKAGES = ("torch", "numpy", "pillow", "pyarrow", "pydantic", "pandas", "mlflow")


def write_model_folder(trained: Trained, settings: Settings, folder: str) -> ServedModel:
    """Fold a trained network, compare the result with it on images of its dataset, and publish both files.

    Parameters
    ----------
    settings : those of the training; ``export.fold`` says which norms are folded
    folder : local, or an fsspec URL; what is there is replaced

    Raises
    ------
    ExportError
        `torch.export` cannot follow the network, or what it wrote gives other logits.
    FoldError
        ``export.fold`` is true, and a norm layer cannot be folded.
    """
    manifest = trained.manifest
    images, labels = first_images(trained, COMPARED_IMAGES)
    folded = fold_norms(trained.network, settings.export)
    reference = reference_of(trained.network, images, labels)
    content, exported = write_checked("pt2", folded.model, reference, remedy="change what the network does there")
    served = ServedModel(
        format=1,
        name=trained.name,
        classes=tuple(manifest.classes),
        image=served_image(settings, manifest),
        dataset=DatasetOrigin(name=manifest.name, digest=manifest.digest),
        network=trained.job.model.network,
        norm=trained.job.model.norm,
        fold=FoldedNorms(folded=folded.folded, left=folded.left),
        checkpoint=trained.checkpoint,
        steps=trained.result.steps,
        mlflow_run=trained.result.run_id,
        compared_on=ComparedImages(split=trained.job.train.evaluate_on, images=len(images)),
        largest_difference=exported.largest_difference,
        sha256=exported.sha256,
        versions=_versions(),
    )
    storage.remove(storage.join(folder, FILE))  # what is there is no model from here on
    storage.publish(storage.join(folder, NETWORK_FILE), content)
    storage.publish_json(storage.join(folder, FILE), served)
    return served


def served_image(settings: Settings, manifest: Manifest) -> ServedImage:
    """How the images of a dataset were made, as its manifest says it.

    Where it is silent, since 0.7.0 or an earlier version wrote it, the settings' own are taken, with a warning.
    """
    listed, shape = dict(manifest.image), manifest.image.shape
    if made := manifest.preparation:
        return ServedImage(**listed, **made.model_dump())
    spec = image_spec(settings.dataset, shape)
    log.warning(
        "dataset %s does not say how its images were made, since an earlier version wrote it: the model will make them "
        "as dataset.image and dataset.source say now, with resize %s", manifest.name, spec.resize,
    )  # fmt: skip
    return ServedImage(
        **listed,
        max_bytes=settings.dataset.source.max_image_bytes,
        **{name: getattr(spec, name) for name in ("resize", "background", "max_pixels", "jpeg_quality", "formats")},
    )


def _versions() -> dict[str, str]:
    versions = {"sparknorm": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # Databricks brings MLflow under other names
            versions[package] = importlib.metadata.version(package)
    return versions
