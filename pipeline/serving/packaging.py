"""A trained network, with everything that MLflow needs to serve it."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from pipeline.config.settings import Settings
from pipeline.data.codec import mode_of
from pipeline.serving.carried import write_carried
from pipeline.serving.model_folder import write_model_folder
from pipeline.serving.served import ServedModel
from pipeline.serving.trained import Trained, first_images
from pipeline.tracking.served_model import FOLDER_NAME, PackagedModel

# What the carried code imports, and what MLflow itself needs to hand a DataFrame over.
_REQUIRED = ("torch", "numpy", "pillow", "pyarrow", "pydantic", "pandas")


def package(trained: Trained, settings: Settings, training: str, folder: Path) -> tuple[PackagedModel, ServedModel]:
    """Write a model folder and the code to run it into a folder of a local disk.

    Parameters
    ----------
    settings : see `write_model_folder`
    training : see `PackagedModel`

    Raises
    ------
    ExportError, FoldError
        See `write_model_folder`.
    """
    served = write_model_folder(trained, settings, str(folder / FOLDER_NAME))
    code = write_carried(folder / "code")
    first, _ = first_images(trained, 1)
    packaged = PackagedModel(
        folder=folder / FOLDER_NAME,
        code=code.folder,
        loader=code.loader,
        training=training,
        run_id=served.mlflow_run,
        step=served.steps,
        example=_png(first[0].numpy()),
        requirements=_requirements(served),
        metadata={
            "classes": list(served.classes),
            "dataset": served.dataset.model_dump(),
            "image": served.image.model_dump(mode="json"),
            "network": served.network,
            "norm": served.norm,
            "folded_norms": len(served.fold.folded),
            "sparknorm": served.versions["sparknorm"],
        },
        params={"network": served.network, "norm": served.norm, "classes": str(len(served.classes))},
    )
    return packaged, served


def _requirements(served: ServedModel) -> list[str]:
    known = {name: version.partition("+")[0] for name, version in served.versions.items()}
    return [f"{name}=={known[name]}" for name in _REQUIRED if name in known]


def _png(pixels_chw: np.ndarray) -> bytes:
    """An image file of these pixels, uint8 (C, H, W): what the model makes of it are the very same."""
    from PIL import Image

    channels = pixels_chw.transpose(1, 2, 0)
    grey = mode_of(pixels_chw.shape) == "L"
    buffer = io.BytesIO()
    Image.fromarray(channels[:, :, 0] if grey else np.ascontiguousarray(channels)).save(buffer, "PNG")
    return buffer.getvalue()
