"""A model folder at work: encoded images to pixels as `ingest` makes them, pixels to probabilities. No Spark.

This module and what it imports are carried inside of registered models (see `pipeline.serving.carried`).
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from pipeline.data import reasons
from pipeline.data.codec import BadImageError, decode_stored
from pipeline.ingest.images import ImageSpec, from_file_of_size
from pipeline.serving.served import FILE, FORMAT, NETWORK_FILE, ServedModel, ServedModelError

# Where MLflow puts the folder within a model of its own.
_WITHIN_MLFLOW_MODEL = "data/model"
# Pixels of the images that go through the network at once: activations take some hundred bytes for each. Those that a
# core of a CPU works on stay in its caches: a small residual network takes 0.6 of the time for 32 images of 64 x 64 at
# a time that it takes for 256.
_PIXELS_AT_ONCE, _PIXELS_OF_A_CORE = 1 << 22, 1 << 17
# But so many images if they can: weights, which are read again for each lot, are what counts where images are large.
_IMAGES_AT_LEAST = 8


class Predictor:
    """A trained network, ready to be asked.

    Parameters
    ----------
    served : what is known of it
    network : uint8 images (N, C, H, W) on the device to float logits (N, classes)
    device : where it computes
    """

    def __init__(self, served: ServedModel, network: Callable[[torch.Tensor], torch.Tensor], device: torch.device):
        self.served = served
        self.device = device
        self._network = network
        self._spec = served.image.spec

    @classmethod
    def load(cls, folder: str | Path, device: str | torch.device = "cpu") -> Predictor:
        """Load a model folder from a local disk, or an MLflow model that has one.

        Parameters
        ----------
        device : "cpu", "cuda", or one of several GPUs such as "cuda:1"

        Raises
        ------
        ServedModelError
            The folder holds no model, its network is damaged, its format is of a later version, or there is no such
            device.
        """
        place = _device(device)
        folder = folder_within(Path(folder))
        served = read_served(folder)
        try:
            content = (folder / NETWORK_FILE).read_bytes()
        except OSError as error:
            raise ServedModelError(f"{folder} has a {FILE} and no {NETWORK_FILE} that can be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != served.sha256:
            raise ServedModelError(f"{folder / NETWORK_FILE} is not what {FILE} says: it was cut or changed")
        return cls(served, _load_network(content, place), place)

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes, in the order of the probabilities."""
        return self.served.classes

    @property
    def image(self) -> ImageSpec:
        """What every image becomes, as `ingest` was told it."""
        return self._spec

    def decode(self, data: bytes | None) -> np.ndarray:
        """The pixels of an encoded image, those that `ingest` would store of the same file.

        Parameters
        ----------
        data : content of a file of one of the formats in ``image.formats``; None where it is missing

        Returns
        -------
        uint8 (C, H, W), perhaps read-only

        Raises
        ------
        BadImageError
            It cannot be used; the message is the reason for which `ingest` sets it aside, one of
            `pipeline.data.reasons`.
        """
        return self.decode_of_size(data)[0]

    def decode_of_size(self, data: bytes | None) -> tuple[np.ndarray, tuple[int, int]]:
        """As `decode`, and the width and height that the file says it has."""
        if data is not None and len(data) > self.served.image.max_bytes:
            raise BadImageError(reasons.TOO_MANY_BYTES)
        stored, size = from_file_of_size(data, self._spec)
        return decode_stored(stored, self._spec.encoding, self._spec.shape), size

    def probabilities(self, images: np.ndarray | torch.Tensor) -> np.ndarray:
        """The probability of each class. Those of an image do not depend on the others but for rounding.

        Parameters
        ----------
        images : uint8 (N, C, H, W), on any device

        Returns
        -------
        float32 (N, classes), each row adding up to 1

        Raises
        ------
        ValueError
            The images have another dtype or shape.
        """
        if not isinstance(images, (np.ndarray, torch.Tensor)):
            raise ValueError(f"images are a {type(images).__name__}: the model takes an array of numpy or torch")
        if isinstance(images, np.ndarray):
            if images.dtype == object:
                raise ValueError("images are an array of objects, as of images of several shapes: stack them to uint8")
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # and nothing writes to it
                images = torch.from_numpy(np.ascontiguousarray(images))  # one turned round, as from BGR, is none
        if images.dtype != torch.uint8 or images.shape[1:] != torch.Size(self._spec.shape):
            raise ValueError(
                f"images are {str(images.dtype).removeprefix('torch.')} of shape {list(images.shape)}: the model takes "
                f"uint8 of shape {[len(images) if images.ndim else 1, *self._spec.shape]}, values 0 to 255"
            )
        with torch.inference_mode():
            parts = [self._of_some(part) for part in images.split(self._images_at_once())] if len(images) else []
        return np.concatenate(parts) if parts else np.zeros((0, len(self.classes)), np.float32)

    def _images_at_once(self) -> int:
        pixels = self._spec.shape[1] * self._spec.shape[2]
        most = max(1, _PIXELS_AT_ONCE // pixels)
        if self.device.type != "cpu":
            return most
        return min(most, max(_IMAGES_AT_LEAST, torch.get_num_threads() * _PIXELS_OF_A_CORE // pixels))

    def _of_some(self, images: torch.Tensor) -> np.ndarray:
        logits = self._network(images.to(self.device))
        return torch.softmax(logits.float(), dim=1).cpu().numpy()


def _device(name: str | torch.device) -> torch.device:
    try:
        place = torch.device(name)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ServedModelError(f"device {name} cannot be used here: {str(error).splitlines()[0]}") from None
    return place


def folder_within(folder: Path) -> Path:
    """The model folder itself: this one, or the one that an MLflow model holds.

    Raises
    ------
    ServedModelError
        Neither is one.
    """
    for place in (folder, folder / _WITHIN_MLFLOW_MODEL):
        if (place / FILE).is_file():
            return place
    raise ServedModelError(f"{folder} holds no model of sparknorm: there is no {FILE}")


def read_served(folder: Path) -> ServedModel:
    """What is known of the model in a model folder.

    Raises
    ------
    ServedModelError
        ``served.json`` is damaged, or of a later version.
    """
    path = folder / FILE
    try:
        content = path.read_bytes()
        if (found := json.loads(content).get("format")) != FORMAT:
            raise ServedModelError(
                f"{path} has format {found!r}, this version of sparknorm runs {FORMAT}: install the one that wrote it"
            )
        return ServedModel.model_validate_json(content)
    except (OSError, AttributeError, json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise ServedModelError(f"{path} is damaged: {str(error).splitlines()[0]}") from error


def _load_network(content: bytes, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    program = torch.export.load(io.BytesIO(content))
    if device.type != "cpu":
        from torch.export.passes import move_to_device_pass

        program = move_to_device_pass(program, device)
    network = program.module()
    for weights in (*network.parameters(), *network.buffers()):
        if weights.ndim == 4:  # on a CPU residual networks then take 0.6 of the time, whatever the images' own layout
            # Not `contiguous`, which leaves those of one channel as they are, and so all that comes of grey images.
            weights.data = weights.data.to(memory_format=torch.channels_last)
    return network
