"""Saves and loads the state of a training, atomically and verified.

A checkpoint is two files: ``step-00000470.pt`` and, published after it, its seal ``step-00000470.json`` with the
SHA-256. Without a matching seal there is no checkpoint, so a torn or damaged one is never loaded. What cannot be read
at the moment is another matter: it is tried again, and then an error, since going on without it would lose steps.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict, Field, ValidationError

from pipeline import storage
from pipeline.config.frozen import FrozenModel
from pipeline.config.identity import NEUTRAL
from pipeline.config.training import OtherVersions
from pipeline.storage import local_file
from pipeline.training.job import Identity
from pipeline.training.versions import check_versions, current_versions

log = logging.getLogger(__name__)

_FILE = re.compile(r"step-\d{8,}\.(pt|json)", re.ASCII)

# Nested dicts and lists of numbers, strings and tensors: what ``torch.load(weights_only=True)`` reads back.
State = dict[str, Any]


class CheckpointError(ValueError):
    """A checkpoint belongs to another run, or cannot be loaded."""


class _DamagedError(ValueError):
    """A file of a checkpoint is not what was written."""


class _Seal(FrozenModel):
    """The JSON file of a checkpoint; the digest and the number of bytes are those of its other file.

    versions : of the packages that have written it; 0.7.0 and earlier did not say
    """

    # What a later version adds to a seal is no damage.
    model_config = ConfigDict(extra="ignore")

    step: int
    bytes: int
    sha256: str
    identity: Identity
    versions: dict[str, str] = Field(default_factory=dict)


def save(folder: str, state: State, *, step: int, identity: Identity, keep: int) -> tuple[str, int]:
    """Publish the state after ``step`` optimizer steps, and delete those of fewer steps but for the newest ones.

    Parameters
    ----------
    identity : of the training; `load_newest` refuses a checkpoint with another
    keep : checkpoints that stay, this one included. One of more steps neither counts nor goes: `load_newest` has
        passed over it, and knows why

    Returns
    -------
    path : str
    size : int
        in bytes
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    path = _path(folder, step, "pt")
    storage.publish(path, data)
    seal = _Seal(
        step=step,
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        identity=identity,
        versions=current_versions(),
    )
    storage.publish(_path(folder, step, "json"), json.dumps(seal.model_dump()).encode())
    try:
        earlier = [other for other in _steps(storage.names(folder), "json") if other < step]
        for old in earlier[: max(0, len(earlier) + 1 - keep)]:
            with storage.retry_for(0):
                _remove(folder, old)
    except Exception as error:  # noqa: BLE001 - this one is saved; the old ones go after the next
        log.warning("old checkpoints in %s could not be deleted: %s", folder, error)
    return path, len(data)


def newest_step(folder: str) -> int:
    """The step of the newest checkpoint whose seal is whole; 0 where there is none. Its state is not read.

    Raises
    ------
    UnreachableError
        The folder or a seal cannot be read.
    """
    names = storage.names(folder)
    for step in sorted(set(_steps(names, "json")).intersection(_steps(names, "pt")), reverse=True):
        try:
            return _read_seal(folder, step).step
        except (FileNotFoundError, _DamagedError):
            continue
    return 0


def load_newest(
    folder: str,
    *,
    identity: Identity,
    device: torch.device,
    repair: bool = False,
    other_versions: OtherVersions = "warn",
    warn: Callable[[str], None] = log.warning,
) -> State | None:
    """Load the newest whole state in the folder; None where there is none. One that is damaged or of which a file is
    missing is passed over with a warning.

    Parameters
    ----------
    identity : see `save`
    device : that its tensors come to
    repair : delete what is damaged or unfinished; of files that a process was writing when it was killed those that
        have not changed for an hour: an earlier rank may not have noticed yet that it was replaced
    other_versions : the setting of this name: what happens where other versions of the packages have made it
    warn : is called with each warning

    Raises
    ------
    CheckpointError
        The checkpoint was made with other settings or from another dataset, or holds no state of a training.
    VersionsError
        Other versions have made it, and ``other_versions`` is ``refuse``.
    UnreachableError
        Storage fails. Nothing is passed over for that, nor deleted: the same call goes on once storage answers.
    """
    names = storage.names(folder)
    sealed = _steps(names, "json")
    if repair:
        _remove_abandoned(folder)
    for step in set(_steps(names, "pt")).difference(sealed) if repair else ():
        _remove(folder, step)
    for step in reversed(sealed):
        try:
            seal, data = _read(folder, step)
        except (FileNotFoundError, _DamagedError) as error:
            warn(f"checkpoint {_path(folder, step)} cannot be used ({error}); trying the one before it")
            if repair:
                _remove(folder, step)
            continue
        check_versions(f"checkpoint {_path(folder, step)}", seal.versions, other_versions, warn)
        return _unpack(folder, seal, data, identity, device)
    return None


def _remove_abandoned(folder: str) -> None:
    if storage.is_local(folder):  # an object store has none, and elsewhere nobody tells how old they are
        try:
            local_file.remove_abandoned(Path(storage.absolute(folder)), _FILE)
        except OSError as error:
            log.warning("unfinished files in %s could not be deleted: %s", folder, error)


def load_step(folder: str, step: int, *, identity: Identity, device: torch.device) -> State:
    """Load the state after ``step`` steps, the newest whole one as another rank has found.

    Raises
    ------
    CheckpointError
        It is missing here, does not match its SHA-256, or belongs to another run.
    UnreachableError
        Storage fails.
    """
    try:
        seal, data = _read(folder, step)
    except (FileNotFoundError, _DamagedError) as error:
        raise CheckpointError(
            f"checkpoint {_path(folder, step)}, which rank 0 reads, cannot be read here: {error}"
        ) from error
    return _unpack(folder, seal, data, identity, device)


def _read(folder: str, step: int) -> tuple[_Seal, bytes]:
    """The two files of a checkpoint. What comes damaged may lie whole in storage: it is read once more."""
    try:
        return _read_once(folder, step)
    except _DamagedError:
        return _read_once(folder, step)


def _read_once(folder: str, step: int) -> tuple[_Seal, bytes]:
    seal = _read_seal(folder, step)
    data = storage.read_bytes(_path(folder, step, "pt"))
    if hashlib.sha256(data).hexdigest() != seal.sha256:
        raise _DamagedError("it does not match its SHA-256")
    return seal, data


def _read_seal(folder: str, step: int) -> _Seal:
    try:
        seal = _Seal.model_validate_json(storage.read_bytes(_path(folder, step, "json")))
    except ValidationError as error:
        raise _DamagedError("its JSON file is damaged") from error
    if seal.step != step:
        raise _DamagedError(f"its JSON file is that of step {seal.step}")
    return seal


def _unpack(folder: str, seal: _Seal, data: bytes, identity: Identity, device: torch.device) -> State:
    different = differences(seal.identity, identity)
    if different:
        raise CheckpointError(
            f"checkpoint {_path(folder, seal.step)} belongs to another run: {'; '.join(different)}. "
            "Use those settings, or another folder"
        )
    try:
        state = torch.load(io.BytesIO(data), map_location=device, weights_only=True)
        if not (isinstance(state, dict) and "model" in state):
            raise TypeError("it has no model")
    except Exception as error:  # it is what was written: another version's, or nothing that this package writes
        # Of what torch says the first sentence: it goes on with how to run the code of a file.
        sentence = str(error).partition("\n")[0].partition(". ")[0]
        raise CheckpointError(
            f"checkpoint {_path(folder, seal.step)} holds no state of a training ({type(error).__name__}: {sentence})"
        ) from error
    return state


def differences(saved: Any, current: Any, name: str = "") -> list[str]:
    """A text for each value in which two nested dicts differ: ``train.learning_rate is 0.1 there, 0.2 here``."""
    if not (isinstance(saved, dict) and isinstance(current, dict)):
        return [] if saved == current else [f"{name} is {saved!r} there, {current!r} here"]
    keys = [*current, *(key for key in saved if key not in current)]
    texts = []
    for key in keys:
        full = f"{name}.{key}" if name else str(key)
        neutral = NEUTRAL.get(full)
        texts += differences(saved.get(key, neutral), current.get(key, neutral), full)
    return texts


def _remove(folder: str, step: int) -> None:
    storage.remove_file(_path(folder, step, "json"))
    storage.remove_file(_path(folder, step, "pt"))


def _path(folder: str, step: int, kind: str = "") -> str:
    return storage.join(folder, f"step-{step:08d}{'.' if kind else ''}{kind}")


def _steps(names: Iterable[str], kind: str) -> list[int]:
    """The steps of the files of one kind, ascending."""
    found = (re.fullmatch(rf"step-(\d{{8,}})\.{kind}", name, re.ASCII) for name in names)
    return sorted(int(match[1]) for match in found if match)
