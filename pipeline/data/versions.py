"""Versions of a dataset: published by one job each, and found again also where ``manifest.json`` is not there.

Version N is there as soon as ``manifest-000N.json`` is, and stays as it is from then on. ``manifest.json`` is a copy of
the newest, for other programs and as the place to begin a search: it may be a version behind for a moment, or gone
where storage replaces a file by deleting it first and a process died in between. Datasets of sparknorm 0.7 and before
have their newest version there alone.
"""

from __future__ import annotations

import json
import logging
import re
from typing import Any

from pydantic import ValidationError

from pipeline import storage
from pipeline.data.manifest import FORMAT, DatasetError, Manifest, seal

log = logging.getLogger(__name__)

FILE_NAME = "manifest.json"
_NUMBERED = re.compile(r"manifest-(\d{4,})\.json")


def file_name(version: int) -> str:
    """Where the manifest of a version lies in the dataset."""
    return f"manifest-{version:04d}.json"


def publish(
    dataset: str, manifest: Manifest, *, before: Manifest | None = None, replaced: Manifest | None = None
) -> Manifest:
    """Make the dataset, or its new version, exist: seal the manifest, publish it and return it.

    Of several jobs that publish the same version one does, and the others are told of it.

    Parameters
    ----------
    dataset : folder or fsspec URL
    before : the version that this one adds to
    replaced : the same version as it was published before its shards were damaged

    Raises
    ------
    DatasetError
        See `seal`; another job has published this version; or storage does not give back what was published.
    """
    sealed = seal(manifest)
    if before is not None:
        storage.create(storage.join(dataset, file_name(before.version)), _text(before))
    path, text = storage.join(dataset, file_name(sealed.version)), _text(sealed)
    if replaced is not None:
        storage.publish(path, text)
    elif not storage.create(path, text):
        _publish_over_nothing(dataset, sealed)
    storage.publish(storage.join(dataset, FILE_NAME), text)
    if load_manifest(dataset, sealed.version).digest != sealed.digest:
        raise DatasetError(f"{path} was published and reads otherwise: the storage of dataset.path is not consistent")
    return sealed


def _publish_over_nothing(dataset: str, sealed: Manifest) -> None:
    """Publish a version whose file is there but empty, as a job that died on a disk without hard links has left it."""
    name = file_name(sealed.version)
    if not storage.size(storage.join(dataset, name)):
        storage.publish(storage.join(dataset, name), _text(sealed))
    elif (other := _load(dataset, name)) is None or other.digest != sealed.digest:
        raise DatasetError(
            f"version {sealed.version} of {dataset} was published by another job (Spark application "
            f"{other and other.spark_application}) while this one wrote: run it again, to add what is not in it"
        )


def mend_pointer(dataset: str, newest: Manifest) -> None:
    """Let ``manifest.json`` be the newest version again, where a job died before it was."""
    path = storage.join(dataset, FILE_NAME)
    if not storage.exists(path) or json.loads(storage.read_bytes(path)).get("digest") != newest.digest:
        storage.publish(path, _text(newest))


def _text(manifest: Manifest) -> bytes:
    return json.dumps(manifest.model_dump(mode="json"), indent=1).encode()


def load_manifest(dataset: str, version: int | None = None) -> Manifest:
    """Read a dataset's manifest and check it against its own digest.

    Parameters
    ----------
    dataset : folder or fsspec URL
    version : of the dataset, from 1; None for the newest

    Raises
    ------
    DatasetError
        There is no manifest or no such version, it is of another format, or its digest does not match its content.
    """
    found = newest(dataset)
    if found is None:
        raise DatasetError(f"{dataset}: no dataset here ({FILE_NAME} is missing); run `ingest` first")
    if version is None or version == found.version:
        return found
    if not 1 <= version <= found.version:
        raise DatasetError(
            f"{dataset} has versions 1 to {found.version}; dataset.version is {version}: null is the newest"
        )
    earlier = _load(dataset, file_name(version))
    if earlier is None:
        raise DatasetError(f"{dataset}: version {version} cannot be read, {file_name(version)} is missing")
    return earlier


def newest(dataset: str) -> Manifest | None:
    """The newest version of a dataset; None where there is no version.

    Raises
    ------
    DatasetError
        A manifest is of another format, or its digest does not match its content.
    """
    found = _load(dataset, FILE_NAME)
    if found is None:
        numbers = [int(match[1]) for name in storage.names(dataset) if (match := _NUMBERED.fullmatch(name))]
        # An empty file is one that a job is making, or died making (`storage.create`).
        whole = [number for number in numbers if storage.size(storage.join(dataset, file_name(number)))]
        found = _load(dataset, file_name(max(whole))) if whole else None
        if found is None:
            return None
        log.warning("%s: %s is missing; the newest version that is there is %d", dataset, FILE_NAME, found.version)
    while following := _load(dataset, file_name(found.version + 1), or_unfinished=True):
        found = following
    return found


def _load(dataset: str, name: str, *, or_unfinished: bool = False) -> Manifest | None:
    """The manifest in a file; None where there is no such file or, with ``or_unfinished``, where it is empty."""
    path = storage.join(dataset, name)
    try:
        data = storage.read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):  # the second where a file is in the place of the folder
        return None
    if or_unfinished and not data:
        return None
    try:
        tree: Any = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise DatasetError(f"{path} is not JSON: {error}") from None
    if not isinstance(tree, dict) or tree.get("format") != FORMAT:
        raise DatasetError(f"{path}: this version reads format {FORMAT}")
    try:
        manifest = Manifest.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        where = " ".join(".".join(str(part) for part in first["loc"]).split())  # names in it may be anything
        raise DatasetError(
            f"{path} is damaged, or was written by an older sparknorm: {where}: {first['msg']}"
        ) from None
    try:
        digest = seal(manifest).digest
    except DatasetError as error:
        raise DatasetError(f"{path} was altered: {' '.join(str(error).split())}") from None
    if digest != manifest.digest:
        raise DatasetError(f"{path} was altered: its content does not match its digest {manifest.digest[:71]!r}")
    return manifest
