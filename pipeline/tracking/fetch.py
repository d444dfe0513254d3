"""A model that MLflow has, brought to this machine: of the registry by alias or version, or of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.exceptions import MlflowException

from pipeline.tracking.client import call_store, store_name, time_to_upload
from pipeline.tracking.outage import RefusedError

_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class ModelNotFoundError(ValueError):
    """MLflow has no such model; the message says which there are."""


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


def fetch_model(uri: str, folder: Path, *, outage_seconds: float) -> FetchedModel:
    """Bring a model's files into a folder.

    Parameters
    ----------
    uri : ``models:/NAME@ALIAS``, ``models:/NAME/VERSION``, or ``runs:/RUN/PATH``
    outage_seconds : how long a registry that is down is waited for, at each call

    Raises
    ------
    ModelNotFoundError
        There is no such model, version, alias or run.
    TrackingError
        The registry is down.
    """
    found = _REGISTERED.fullmatch(uri)
    if found is None and not uri.startswith("runs:/"):
        raise ModelNotFoundError(f"{uri}: write models:/NAME@ALIAS, models:/NAME/VERSION, or runs:/RUN/model")
    client = mlflow.MlflowClient()
    name, version, run_id = uri, "0", uri.split("/")[1]
    try:
        if found is not None:
            name = found["name"]

            def look_up() -> tuple[str, str]:
                if found["alias"] is None:
                    entry = client.get_model_version(name, found["version"])
                else:
                    entry = client.get_model_version_by_alias(name, found["alias"])
                return str(entry.version), entry.run_id or ""

            version, run_id = call_store(f"find {uri}", look_up, outage_seconds)
            uri = f"models:/{name}/{version}"  # an alias may move meanwhile

        def download() -> str:
            return mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=str(folder))

        with time_to_upload():
            path = call_store(f"fetch {uri}", download, outage_seconds)
    except RefusedError as error:
        raise ModelNotFoundError(f"{uri} is not at {store_name()}: {_known(client, found)}") from error
    return FetchedModel(Path(path), name, version, run_id)


def _known(client: mlflow.MlflowClient, found: re.Match[str] | None) -> str:
    """What there is instead of what was asked for."""
    if found is None:
        return "no run, or no model of a run, has that address"
    name = found["name"]
    try:
        model = client.get_registered_model(name)
        versions = sorted(int(each.version) for each in client.search_model_versions(f"name='{name}'"))
    except MlflowException:
        names = sorted(model.name for model in client.search_registered_models(max_results=20))
        return f"no model is registered as {name}; there are {', '.join(names) or 'none'}"
    aliases = ", ".join(f"{alias} (version {number})" for alias, number in sorted(model.aliases.items()))
    return (
        f"{name} has the versions {', '.join(map(str, versions)) or 'none'}, and the aliases {aliases or 'none'}: "
        "`sparknorm register` gives them"
    )
