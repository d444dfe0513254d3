"""Saves and loads the state of a training, atomically and verified.

A checkpoint is two files: ``step-00000470.pt`` and, published after it, ``step-00000470.json`` with its SHA-256.
Without a matching JSON file there is no checkpoint, so a torn or damaged one is never loaded.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from typing import Any

import torch
from pydantic import ValidationError

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.training.job import Identity

log = logging.getLogger(__name__)


# Nested dicts and lists of numbers, strings and tensors: what ``torch.load(weights_only=True)`` reads back.
State = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint belongs to another run."""


class _Seal(FrozenModel):
    """The JSON file of a checkpoint; the digest and the number of bytes are those of its other file."""

    step: int
    bytes: int
    sha256: str
    identity: Identity


def save(folder: str, state: State, *, step: int, identity: Identity, keep: int) -> tuple[str, int]:
    """Publish the state after ``step`` optimizer steps and delete all but the newest ``keep``.

    Parameters
    ----------
    identity : of the training; `load_newest` refuses a checkpoint with another

    Returns
    -------
    path : str
    size : int
        in bytes
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    name = f"step-{step:08d}"
    path = storage.join(folder, f"{name}.pt")
    storage.publish(path, data)
    seal = _Seal(step=step, bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), identity=identity)
    storage.publish(storage.join(folder, f"{name}.json"), json.dumps(seal.model_dump()).encode())
    for old in _names(folder)[:-keep]:
        _remove(folder, old)
    return path, len(data)


def newest_step(folder: str) -> int:
    """The step of the newest checkpoint, whole or damaged; 0 where there is none. Nothing but names is read."""
    names = _names(folder)
    return int(names[-1].removeprefix("step-")) if names else 0


def load_newest(folder: str, *, identity: Identity, device: torch.device, repair: bool = False) -> State | None:
    """Load the newest whole state in the folder; None where there is none. A damaged one is passed over with a warning.

    Parameters
    ----------
    identity : see `save`
    device : that its tensors come to
    repair : delete what is damaged or unfinished, which would else count as the newest; what cannot be read now stays

    Raises
    ------
    CheckpointError
        The checkpoint was made with other settings or from another dataset.
    """
    sealed = _names(folder)
    states = {file.removesuffix(".pt") for file in storage.names(folder) if file.endswith(".pt")}
    for name in states.difference(sealed) if repair else ():
        _remove(folder, name)
    for name in reversed(sealed):
        try:
            seal, data = _read(folder, name)
        except (OSError, ValueError) as error:
            log.warning("checkpoint %s/%s cannot be used (%s); trying the one before it", folder, name, error)
            if repair and isinstance(error, (FileNotFoundError, ValueError)):
                _remove(folder, name)
            continue
        return _unpack(folder, name, seal, data, identity, device)
    return None


def load_step(folder: str, step: int, *, identity: Identity, device: torch.device) -> State:
    """Load the state after ``step`` steps, the newest whole one as another rank has found.

    Raises
    ------
    CheckpointError
        It cannot be read here, does not match its SHA-256, or belongs to another run.
    """
    name = f"step-{step:08d}"
    try:
        seal, data = _read(folder, name)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {folder}/{name}, which rank 0 reads, cannot be read here: {error}"
        ) from error
    return _unpack(folder, name, seal, data, identity, device)


def _read(folder: str, name: str) -> tuple[_Seal, bytes]:
    try:
        seal = _Seal.model_validate_json(storage.read_bytes(storage.join(folder, f"{name}.json")))
    except ValidationError as error:
        raise ValueError("its JSON file is damaged") from error
    data = storage.read_bytes(storage.join(folder, f"{name}.pt"))
    if hashlib.sha256(data).hexdigest() != seal.sha256:
        raise ValueError("it does not match its SHA-256")
    return seal, data


def _unpack(folder: str, name: str, seal: _Seal, data: bytes, identity: Identity, device: torch.device) -> State:
    different = differences(seal.identity, identity)
    if different:
        raise CheckpointError(
            f"checkpoint {folder}/{name} belongs to another run: {'; '.join(different)}. "
            "Use those settings, or another folder"
        )
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True)


def differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """A text for each value in which two nested dicts differ: ``train.learning_rate is 0.1 there, 0.2 here``."""
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return [] if saved == current else [f"{name} is {saved!r} there, {current!r} here"]
    keys = [*current, *(key for key in saved if key not in current)]
    parts = [differences(saved.get(key), current.get(key), f"{name}.{key}" if name else str(key)) for key in keys]
    return [text for part in parts for text in part]


def _remove(folder: str, name: str) -> None:
    storage.remove(storage.join(folder, f"{name}.json"))
    storage.remove(storage.join(folder, f"{name}.pt"))


def _names(folder: str) -> list[str]:
    return [name.removesuffix(".json") for name in storage.names(folder) if name.endswith(".json")]
