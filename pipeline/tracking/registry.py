"""A registered model: its versions, their tags, and the aliases by which the world asks for one of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion, RegisteredModel
from mlflow.exceptions import MlflowException

from pipeline.config.secrets import mask
from pipeline.config.study import TrackingSettings
from pipeline.tracking.client import call_store, open_database, time_to_upload
from pipeline.tracking.outage import Answer, RefusedError, TrackingError, reason

# MLflow's error for what is not there; some stores say that a whole endpoint is not.
_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
_EXISTS = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")
# A tag's value is cut to this by no store that we know of.
_TAG_LENGTH = 5000


class RegistryError(ValueError):
    """A registered model, version or alias is not there, or not what it has to be."""


@dataclass(frozen=True)
class Version:
    """A version of the registered model.

    number : as MLflow counts, from 1
    run_id : of the training
    tags : as they were when it was looked up
    """

    number: str
    run_id: str
    tags: Mapping[str, str]


class Registry:
    """One registered model of MLflow, on the driver.

    Parameters
    ----------
    tracking : where MLflow is; its ``outage_seconds`` bound every wait
    uri : of the registry, such as ``databricks-uc``; None is where the tracking is
    model : name of the registered model, in Unity Catalog of three parts

    Attributes
    ----------
    check : called before each change of a version or an alias; raises where this process may not make it

    Raises
    ------
    TrackingError
        The store cannot be opened; the setting is named.
    """

    def __init__(self, tracking: TrackingSettings, uri: str | None, model: str):
        self.model, self._seconds = model, tracking.outage_seconds
        try:
            mlflow.set_tracking_uri(tracking.uri)
            open_database(tracking.uri)
            if uri is not None:
                open_database(uri, "registry.uri")
        except (MlflowException, OSError) as error:
            name, place = ("tracking.uri", tracking.uri) if uri is None else ("registry.uri", uri)
            raise TrackingError(f"{name} {mask(place)} cannot be used: {reason(error)}") from error
        # Not MLflow's own setting, which would stay for all that comes later in this process.
        self._client, self._uri = mlflow.MlflowClient(registry_uri=uri), uri
        self.check: Callable[[], None] | None = None

    def impatient(self) -> Registry:
        """The same model, by calls that do not wait for a server that is down, and that `check` is not asked for."""
        other = copy(self)
        other._seconds, other.check = 0.0, None
        return other

    @property
    def address(self) -> str:
        """What loads a version by an alias, but for the alias: ``models:/pets``."""
        return f"models:/{self.model}"

    def exists(self) -> bool:
        """Whether there is such a registered model."""
        return self._or_none("find the model", lambda: self._client.get_registered_model(self.model)) is not None

    def holder(self, alias: str) -> Version | None:
        """The version that has an alias; None where none has."""
        find = partial(self._client.get_model_version_by_alias, self.model, alias)
        found = self._or_none(f"find {self.model}@{alias}", find, "INVALID_PARAMETER_VALUE")
        return None if found is None else _version(found)

    def require_holder(self, alias: str) -> Version:
        """The version that has an alias.

        Raises
        ------
        RegistryError
            There is no such model, or none of its versions has it; the message says which aliases there are.
        """
        if found := self.holder(alias):
            return found
        model = self._require_model()
        known = ", ".join(f"{name} (version {number})" for name, number in sorted(model.aliases.items())) or "none"
        raise RegistryError(f"no version of {self.model} has the alias {alias!r}; aliases: {known}")

    def _require_model(self) -> RegisteredModel:
        found = self._or_none("find the model", lambda: self._client.get_registered_model(self.model))
        if found is None:
            raise RegistryError(f"there is no registered model {self.model!r}: run `sparknorm register` first")
        return found

    def create(self) -> None:
        """Make the registered model, if it is absent.

        Raises
        ------
        TrackingError
            The registry is down, or refuses it, as it may a name.
        """
        try:
            self._call(f"make the registered model {self.model}",
                       lambda: self._client.create_registered_model(self.model))  # fmt: skip
        except RefusedError as error:
            if _code(error.__cause__) not in _EXISTS:
                raise

    def model_tags(self) -> Mapping[str, str]:
        """The tags of the registered model itself.

        Raises
        ------
        RegistryError
            There is no such model.
        """
        return dict(self._require_model().tags)

    def tag_model(self, key: str, value: str) -> None:
        """Set a tag of the registered model."""
        change = partial(self._client.set_registered_model_tag, self.model, key, _fitting(value))
        self._call(f"tag {self.model}", change)

    def untag_model(self, key: str) -> None:
        """Delete a tag of the registered model, if it has it."""
        self._or_none("delete a tag", partial(self._client.delete_registered_model_tag, self.model, key))

    def versions(self, tag: str, value: str | None = None, *, run_id: str | None = None) -> list[Version]:
        """The versions with a tag, and with this value of it where one is given; the newest first.

        Each is asked for by itself: Unity Catalog finds versions by the model's name alone, and without their tags.

        Parameters
        ----------
        run_id : of the training, where it is known; others are not asked for
        """
        search = partial(self._client.search_model_versions, f"name='{self.model}'", max_results=1000)
        listed: Sequence[ModelVersion] = self._or_none("list versions", search) or []
        wanted = (each for each in listed if run_id is None or each.run_id in (run_id, "", None))
        numbers = sorted((str(each.version) for each in wanted), key=int, reverse=True)
        found = [self.version(number) for number in numbers]
        return [each for each in found if tag in each.tags and value in (None, each.tags[tag])]

    def version(self, number: str) -> Version:
        """A version by its number."""
        get = partial(self._client.get_model_version, self.model, number)
        return _version(self._call(f"get version {number} of {self.model}", get))

    def add(self, model_id: str, tags: Mapping[str, str], description: str = "") -> Version:
        """Make a LoggedModel a version of the registered model that there is; it has its tags from the beginning.

        Parameters
        ----------
        description : in Markdown

        Raises
        ------
        TrackingError
            The registry is down, or refuses it; nothing was registered.
        """
        create = partial(
            self._client.create_model_version,
            self.model,
            f"models:/{model_id}",
            tags={key: _fitting(value) for key, value in tags.items()},
            description=mask(description),
            model_id=model_id,
        )
        with time_to_upload():  # Unity Catalog copies the files
            made = self._change(f"register a version of {self.model}", create)
        return self.version(str(made.version))

    def tag(self, number: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version, in their order."""
        for key, value in tags.items():
            change = partial(self._client.set_model_version_tag, self.model, number, key, _fitting(value))
            self._change(f"tag version {number} of {self.model}", change)

    def untag(self, number: str, key: str) -> None:
        """Delete a tag of a version, if it has it."""
        self._ask()
        self._or_none("delete a tag", partial(self._client.delete_model_version_tag, self.model, number, key))

    def set_alias(self, alias: str, number: str) -> None:
        """Let a version have an alias, which another one then loses."""
        change = partial(self._client.set_registered_model_alias, self.model, alias, number)
        self._change(f"set {self.model}@{alias}", change)

    def delete_alias(self, alias: str) -> None:
        """Let no version have an alias."""
        self._ask()
        self._or_none("delete an alias", partial(self._client.delete_registered_model_alias, self.model, alias))

    def attach(self, run_id: str, name: str, text: str) -> None:
        """Store a text as an artifact of a run."""
        with time_to_upload():
            self._call(f"store {name}", partial(self._client.log_text, run_id, text, name))

    def download(self, number: str, folder: Path) -> Path:
        """Copy the files of a version into a folder of a local disk, and return where they are."""
        uri = f"{self.address}/{number}"
        get = partial(
            mlflow.artifacts.download_artifacts, artifact_uri=uri, dst_path=str(folder), registry_uri=self._uri
        )
        with time_to_upload():
            return Path(self._call(f"download {uri}", get))

    def _call(self, what: str, call: Callable[[], Answer]) -> Answer:
        return call_store(what, call, self._seconds)

    def _ask(self) -> None:
        if self.check is not None:
            self.check()

    def _change(self, what: str, call: Callable[[], Answer]) -> Answer:
        self._ask()
        return self._call(what, call)

    def _or_none(self, what: str, call: Callable[[], Answer], *codes: str) -> Answer | None:
        """The answer; None where MLflow says that there is no such thing."""
        try:
            return self._call(what, call)
        except RefusedError as error:
            if _code(error.__cause__) in (*_ABSENT, *codes):
                return None
            raise


def _code(error: BaseException | None) -> str:
    return getattr(error, "error_code", "")


def _version(found: ModelVersion) -> Version:
    return Version(str(found.version), found.run_id or "", dict(found.tags))


def _fitting(value: str) -> str:
    return mask(value)[:_TAG_LENGTH]
