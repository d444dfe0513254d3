"""A model folder as MLflow's pyfunc flavour runs it: rows of a DataFrame in, probabilities out. No MLflow is imported.

This module is carried inside of registered models and loaded from there, also where sparknorm is not installed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import torch

from pipeline.data.codec import BadImageError
from pipeline.serving.predictor import Predictor

# The columns of the input, of which a row fills one, and the parameter with its values.
IMAGE, PIXELS = "image", "pixels"
BAD_IMAGES, ERROR, NAN = "bad_images", "error", "nan"
# Bytes of pixels that are decoded before the network gets them.
_BYTES_AT_ONCE = 64 << 20


class Rows(Protocol):
    """The part of a pandas DataFrame that is used here."""

    columns: Any

    def __getitem__(self, name: str) -> Iterable[Any]: ...
    def __len__(self) -> int: ...


class ImageClassifier:
    """What `mlflow.pyfunc.load_model` wraps.

    predictor : the network with its preprocessing
    """

    def __init__(self, predictor: Predictor):
        self.predictor = predictor

    def predict(self, model_input: Rows, params: Mapping[str, Any] | None = None) -> np.ndarray:
        """The probability of each class for each row.

        Parameters
        ----------
        model_input : DataFrame with the column ``image`` (bytes, the content of an image file; in JSON their base64,
            which MLflow decodes), or the column ``pixels`` (C * H * W integers from 0 to 255, row-major, flat or
            nested), or both, of which a row then fills one; an array in the column ``image`` is taken for pixels
        params : ``bad_images`` is ``error``, or ``nan``: what a row gives whose image cannot be used

        Returns
        -------
        float32 (rows, classes)

        Raises
        ------
        ValueError
            The columns are others, or an image cannot be used; the row is named.
        """
        bad_images = dict(params or {}).get(BAD_IMAGES, ERROR)
        if bad_images not in (ERROR, NAN):
            raise ValueError(f"{BAD_IMAGES} is {bad_images!r}: use {ERROR} or {NAN}")
        values = self._values(model_input)
        shape = self.predictor.image.shape
        rows = max(1, _BYTES_AT_ONCE // self.predictor.image.raw_bytes)
        found = np.full((len(values), len(self.predictor.classes)), np.nan, np.float32)
        for first in range(0, len(values), rows):
            images = np.empty((min(rows, len(values) - first), *shape), np.uint8)
            usable: list[int] = []
            for number in range(first, first + len(images)):
                try:
                    images[len(usable)] = self._pixels(values[number])
                    usable.append(number)
                except BadImageError as error:
                    if bad_images == ERROR:
                        raise ValueError(f"row {number}: the image cannot be used: {error}") from None
                except ValueError as error:
                    if bad_images == ERROR:
                        raise ValueError(f"row {number}: {error}") from None
            found[usable] = self.predictor.probabilities(images[: len(usable)])
        return found

    @staticmethod
    def _values(model_input: Rows) -> list[Any]:
        """For each row the column that it fills; None where it fills none."""
        columns = [list(model_input[name]) for name in (IMAGE, PIXELS) if name in model_input.columns]
        if not columns:
            raise ValueError(
                f"the input has neither a column {IMAGE!r} (content of image files) nor a column {PIXELS!r} (arrays): "
                f"it has {list(model_input.columns)}"
            )
        return [next((value for value in row if not _is_missing(value)), None) for row in zip(*columns, strict=True)]

    def _pixels(self, value: Any) -> np.ndarray:
        """uint8 (C, H, W) of one value."""
        if value is None or isinstance(value, (bytes, bytearray, memoryview)):
            return self.predictor.decode(None if value is None else bytes(value))
        if isinstance(value, str):
            raise ValueError(
                f"a text: {IMAGE!r} is the content of an image file, in bytes (in JSON as base64, which MLflow decodes)"
            )
        shape = self.predictor.image.shape
        wanted = f"pixels are {' x '.join(map(str, shape))} whole numbers from 0 to 255, row-major, flat or nested so"
        try:
            pixels = np.array(_plain(value))
        except ValueError:  # rows of different lengths
            raise ValueError(wanted) from None
        nested = shape if shape[0] > 1 or pixels.ndim != 2 else shape[1:]  # grey images may lack the channel
        if pixels.shape not in ((math.prod(shape),), nested):
            raise ValueError(f"{wanted}; these are {' x '.join(map(str, pixels.shape)) or 'no array'}")
        if pixels.dtype.kind not in "iu" or pixels.min() < 0 or pixels.max() > 255:
            raise ValueError(f"{wanted}; these are {pixels.dtype}" + _ends(pixels))
        return pixels.astype(np.uint8).reshape(shape)


def _ends(pixels: np.ndarray) -> str:
    return f" from {pixels.min():g} to {pixels.max():g}" if pixels.dtype.kind in "iuf" else ""


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value))


def _plain(value: Any) -> Any:
    """Nested lists of numbers: Spark hands nested arrays over as arrays of arrays."""
    if isinstance(value, np.ndarray):
        return [_plain(part) for part in value] if value.dtype == object else value
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


def _load_pyfunc(data_path: str) -> ImageClassifier:
    """What MLflow calls to load the model; the device is the one that its PyTorch flavour would take."""
    device = os.environ.get("MLFLOW_DEFAULT_PREDICTION_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    return ImageClassifier(Predictor.load(data_path, device))
