"""`export`: a trained network as files that serve it without this package.

What a file gives is compared with what the trained network gives before the file is published.
"""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline import __version__, storage
from pipeline.config.settings import Settings, digest_of
from pipeline.config.study import ExportSettings
from pipeline.driver.record import first_bytes, slug
from pipeline.driver.train import training_name
from pipeline.serving.result import (
    INPUT,
    ONNX_PACKAGES,
    OUTPUT,
    ComparedImages,
    DatasetOrigin,
    ExportResult,
    FoldedNorms,
    Tensor,
)
from pipeline.storage.writable import check_writable

if TYPE_CHECKING:
    from torch import nn

    from models.fold import Folded

FILE = "export.json"
# At most this many images are compared.
COMPARED_IMAGES = 500
# Bytes of the name of a folder.
_LONGEST_NAME = 255


def export(settings: Settings) -> ExportResult:
    """Write the newest network that `train` trained with these settings into `export_folder`, as files to serve.

    An earlier export in the folder stays where this one is refused. ``export.json`` is written last: without it the
    export is not whole.

    Raises
    ------
    SettingsError
        A setting lists several values.
    ExportError
        No such training has ended, packages are missing, or a file gives other logits than the trained network.
    FoldError
        ``export.fold`` is true, and a norm layer cannot be folded.
    """
    from pipeline.serving.checked import reference_of, write_checked
    from pipeline.serving.formats import FORMATS, chosen_formats
    from pipeline.serving.trained import find_trained, first_images

    settings.require_single_run()
    formats = chosen_formats(settings.export)
    folder = export_folder(settings)
    check_writable("output", settings.output)
    trained = find_trained(settings)
    manifest = trained.manifest
    images, labels = first_images(trained, COMPARED_IMAGES)
    folded = fold_norms(trained.network, settings.export)
    reference = reference_of(trained.network, images, labels)
    written = {FORMATS[name].file: write_checked(name, folded.model, reference) for name in formats}
    result = ExportResult(
        name=training_name(settings),
        network=settings.model.network,
        norm=settings.model.norm,
        checkpoint=trained.checkpoint,
        steps=trained.result.steps,
        mlflow_run=trained.result.run_id,
        dataset=DatasetOrigin(name=manifest.name, digest=manifest.digest),
        classes=tuple(manifest.classes),
        input=Tensor(name=INPUT, dtype="uint8", shape=("batch", *manifest.image.shape)),
        output=Tensor(name=OUTPUT, dtype="float32", shape=("batch", len(manifest.classes))),
        fold=FoldedNorms(folded=folded.folded, left=folded.left),
        compared_on=ComparedImages(split=settings.train.evaluate_on, images=len(images)),
        accuracy=reference.accuracy,
        files={file: exported for file, (_, exported) in written.items()},
        versions=_versions(formats),
    )
    storage.remove(folder)  # only now that nothing can be refused any more: until then an earlier export stays
    for file, (content, _) in written.items():
        storage.publish(storage.join(folder, file), content)
    storage.publish_json(storage.join(folder, FILE), result)
    return result


def export_folder(settings: Settings) -> str:
    """The folder that `export` writes into: one for each name of a training, below the output folder."""
    name = slug(training_name(settings))
    if len(name.encode()) > _LONGEST_NAME:
        name = f"{first_bytes(name, _LONGEST_NAME - 13)}-{digest_of(name).removeprefix('sha256:')[:12]}"
    return storage.join(settings.output, "export", name)


def fold_norms(network: nn.Module, settings: ExportSettings) -> Folded:
    """Fold the norm layers that the settings ask to fold."""
    from models.fold import Folded, fold

    if settings.fold is False:
        return Folded(network, (), {})
    return fold(network, partial=settings.fold == "auto")


def _versions(formats: Sequence[str]) -> dict[str, str]:
    packages = ("torch", "numpy", *(ONNX_PACKAGES if "onnx" in formats else ()))
    versions = {package: importlib.metadata.version(package) for package in packages}
    return {"sparknorm": __version__, "python": platform.python_version(), **versions}
