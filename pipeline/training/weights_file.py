"""The file of `model.weights`: read from any storage, told from another by its SHA-256, never run as code."""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
import warnings
from typing import Any

import torch

from models.weights import tensors_of
from pipeline import storage
from pipeline.config.model import ModelSettings

# The digest of what was read, by path and what its storage says of its version: a study asks before each trial.
_DIGESTS: dict[tuple[str, str], str] = {}
_NOT_CODE = "sparknorm loads tensors alone, and runs no code of a file: save `model.state_dict()`, or safetensors"


class WeightsError(ValueError):
    """The file of `model.weights` cannot be used; the message begins with its path."""

    final = True  # another attempt would end the same way

    def __init__(self, path: str, problem: str):
        super().__init__(f"model.weights {path}: {problem}")


def digest_of(model: ModelSettings) -> str:
    """The SHA-256 of the weights that a network starts from, 64 hex digits; empty of one that starts from none.

    The file is read unless ``model.weights_sha256`` says it, or this process has read it, and it is as it was.

    Raises
    ------
    WeightsError
        There is no such file.
    """
    if model.weights is None:
        return ""
    if model.weights_sha256 is not None:
        return model.weights_sha256
    key = (model.weights, _version(model.weights))
    if key not in _DIGESTS:
        _DIGESTS[key] = hashlib.sha256(_bytes(model.weights)).hexdigest()
    return _DIGESTS[key]


def read_weights(model: ModelSettings, expected: str = "") -> dict[str, torch.Tensor]:
    """The tensors of ``model.weights`` by name, on the CPU.

    Parameters
    ----------
    expected : SHA-256 of the file as the driver has read it; empty where nobody says

    Raises
    ------
    WeightsError
        The file is not there, not what is expected, damaged, or holds something else than tensors.
    UnreachableError
        Storage fails.
    """
    path = model.weights
    assert path is not None
    data = _bytes(path)
    found = hashlib.sha256(data).hexdigest()
    if model.weights_sha256 not in (None, found):
        raise WeightsError(path, f"its SHA-256 is {found}, and model.weights_sha256 is {model.weights_sha256}")
    if expected not in ("", found):
        raise WeightsError(
            path,
            f"{socket.gethostname()} reads another file than the driver did: its SHA-256 is {found}, not {expected}",
        )
    try:
        return tensors_of(_safetensors(path, data) if data[8:9] == b"{" else _state_dict(path, data))
    except WeightsError:
        raise
    except ValueError as error:
        raise WeightsError(path, str(error)) from error


def check_there(path: str) -> None:
    """Check that this process sees the file.

    Raises
    ------
    WeightsError
        It is not there.
    """
    _version(path)


def _version(path: str) -> str:
    version = None if storage.is_folder(path) else storage.version(path)
    if version is None:
        raise WeightsError(path, f"there is no such file, as {socket.gethostname()} sees it")
    return version


def _bytes(path: str) -> bytes:
    _version(path)
    return storage.read_bytes(path)


def _safetensors(path: str, data: bytes) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise WeightsError(
            path, f"{socket.gethostname()} lacks the package safetensors, which reads it: pip install safetensors"
        ) from error
    try:
        return safetensors.torch.load(data)
    except Exception as error:  # of the Rust library's own kinds, of which it makes no promise
        raise WeightsError(path, f"it is damaged, or no safetensors file ({_sentence(error)})") from error


def _state_dict(path: str, data: bytes) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it may be an archive of TorchScript, which is an error
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL " in str(error):
            raise WeightsError(path, f"it holds pickled code ({_culprit(error)}). {_NOT_CODE}") from error
        raise WeightsError(path, f"it is damaged, or no file of weights ({_sentence(error)})") from error
    except Exception as error:  # an archive, a pickle or a number that ends too early: of many kinds
        if "TorchScript" in str(error):
            raise WeightsError(path, f"it is an archive of TorchScript, which holds code. {_NOT_CODE}") from error
        raise WeightsError(path, f"it is damaged, or no file of weights ({_sentence(error)})") from error


def _culprit(error: Exception) -> str:
    """The first function that the file wants to be called, of torch's long text."""
    return str(error).partition("GLOBAL ")[2].split()[0]


def _sentence(error: Exception) -> str:
    """Of what a library says the first sentence: torch's goes on with how to run the code of a file."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0].partition('. ')[0]}"
