"""A model that MLflow has, brought to this machine: of the registry by alias or version, or of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mlflow

from pipeline.config.study import TrackingSettings
from pipeline.tracking.client import call_store, store_name, time_to_upload
from pipeline.tracking.outage import RefusedError
from pipeline.tracking.registry import Registry, RegistryError, Version

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")
_OF_RUN = re.compile(r"runs:/[^/]+/.*[^/].*")


@dataclass(frozen=True)
class FetchedModel:
    """A model's files on this machine.

    folder : of the MLflow model
    name, version : of the registered model; those of a run's model are its address and "0"
    run_id : of the run that made it
    """

    folder: Path
    name: str
    version: str
    run_id: str


def fetch_model(tracking: TrackingSettings, registry_uri: str | None, uri: str, folder: Path) -> FetchedModel:
    """Bring a model's files into a folder.

    Parameters
    ----------
    tracking, registry_uri : where MLflow and its registry are, as `Registry` takes them
    uri : ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or ``runs:/RUN/PATH``

    Raises
    ------
    RegistryError
        There is no such model, version, alias or run.
    TrackingError
        The registry is down for ``tracking.outage_seconds``.
    """
    if _OF_RUN.fullmatch(uri):
        return _of_run(tracking, uri, folder)
    found = _REGISTERED.fullmatch(uri)
    if found is None:
        raise RegistryError(f"{uri}: write models:/NAME@ALIAS, models:/NAME/VERSION, or runs:/RUN/served")
    registry = Registry(tracking, registry_uri, found["name"])
    version = registry.require_holder(found["alias"]) if found["alias"] else _numbered(registry, found["version"])
    # By its number: an alias may move meanwhile.
    return FetchedModel(registry.download(version.number, folder), found["name"], version.number, version.run_id)


def _numbered(registry: Registry, number: str) -> Version:
    try:
        return registry.version(number)
    except RefusedError as error:
        if not registry.exists():
            text = f"there is no registered model {registry.model!r}: run `sparknorm register` first"
        else:
            text = f"{registry.model} has no version {number}: models:/{registry.model}@champion is the one in use"
        raise RegistryError(text) from error


def _of_run(tracking: TrackingSettings, uri: str, folder: Path) -> FetchedModel:
    def download() -> str:
        return mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))

    mlflow.set_tracking_uri(tracking.uri)
    try:
        with time_to_upload():
            path = Path(call_store(f"fetch {uri}", download, tracking.outage_seconds))
    except RefusedError as error:
        raise RegistryError(
            f"{uri} is not at {store_name()}: no run, or no model of a run, has that address"
        ) from error
    return FetchedModel(path, uri, "0", uri.split("/")[1])
