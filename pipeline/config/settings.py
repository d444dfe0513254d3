"""The whole of the settings, and the checks that concern more than one section."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, model_validator

from pipeline.config import dotted, yaml_text
from pipeline.config.cluster import SparkSettings, WorkerSettings
from pipeline.config.dataset import DatasetSettings, ReaderSettings
from pipeline.config.frozen import FrozenModel
from pipeline.config.import_path import is_import_path
from pipeline.config.model import ModelSettings
from pipeline.config.or_auto import AUTO
from pipeline.config.registry import RegistrySettings
from pipeline.config.score import ScoreSettings
from pipeline.config.secrets import mask, masked
from pipeline.config.study import CompareSettings, ExportSettings, TrackingSettings
from pipeline.config.training import CheckpointSettings, TrainSettings, divisors
from pipeline.config.tune import TuneSettings

# Sections whose settings may have several values in one study.
VARIABLE = ("model", "train", "reader", "workers")

# Settings that a trial of the search has values of its own of.
SET_BY_SEARCH = (
    "train.epochs",
    "train.first_cycle_epochs",
    "train.evaluate_on",
    "train.evaluations_per_epoch",
    "train.final_network",
)


# Settings that a search with `tune` sets, or that would make its trials another question, with the reason.
SET_BY_TUNE = {
    "train.seed": "with which all trials train: set tune.confirm_seeds",
    "train.evaluate_on": "since trials are evaluated on tune.search_on",
    "train.select_on": "since trials are evaluated on tune.search_on",
    "train.final_network": "since a trial is judged by its last evaluation",
    "train.evaluations_per_epoch": "by which trials are held against each other",
    "train.first_cycle_epochs": "since a trial has one schedule",
}

# Settings that no arm of a comparison may have a value of its own of, with what would be right.
SET_BY_COMPARE = {
    "train.seed": "set compare.seeds",
    "train.evaluate_on": "arms are compared on one split, by which nothing is chosen: give it one value beside the "
    "grid, and make a study for each split",
}

# Settings of the model that only networks of `models.NETWORKS` read: one of your own has ``model.options``.
OF_OUR_NETWORKS = (
    *("depth", "width", "widen", "block", "cell", "patch", "heads"),
    *("norm_place", "activation", "init_scale", "zero_init"),
)


class SettingsError(ValueError):
    """A setting is missing or unknown, or its value cannot be used; the message says what would be right."""


class Settings(FrozenModel):
    """The settings of one study are everything that a command needs, from one YAML file."""

    name: str = Field(..., min_length=1, description="name of the study; runs are named after it")
    output: str = Field(
        "runs", description="folder or fsspec URL of everything that the commands write, but for the dataset"
    )
    dataset: DatasetSettings = DatasetSettings()
    reader: ReaderSettings = ReaderSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    workers: WorkerSettings = WorkerSettings()
    compare: CompareSettings = CompareSettings()
    tune: TuneSettings = TuneSettings()
    export: ExportSettings = ExportSettings()
    score: ScoreSettings = ScoreSettings()
    registry: RegistrySettings = RegistrySettings()
    tracking: TrackingSettings = TrackingSettings()
    spark: SparkSettings = SparkSettings()

    # Names of settings that were loaded with a list in the place of their value; the list is in compare.grid now.
    _listed: tuple[str, ...] = PrivateAttr(())

    @model_validator(mode="after")
    def _workers_divide_lanes(self) -> Settings:
        if self.train.lanes % self.workers.count:
            raise ValueError(
                f"workers.count {self.workers.count} does not divide train.lanes {self.train.lanes}: "
                f"use one of {list(self.train.world_sizes)}"
            )
        try:
            train = self.train.for_workers(self.workers.count)
        except ValueError as error:
            raise ValueError(f"train.{error}") from None
        if train.batch_size == AUTO:
            return self  # the rest is checked once it is known
        rows, lanes = train.global_batch // self.workers.count, train.lanes // self.workers.count
        if rows % train.accumulate:
            raise ValueError(
                f"train.accumulate {train.accumulate} does not divide a worker's {rows} images of a batch: use one of "
                f"{list(divisors(rows))}"
            )
        if self.model.norm_statistics == "lane" and lanes % train.accumulate:
            raise ValueError(
                f"train.accumulate {train.accumulate} does not divide a worker's {lanes} lanes, and "
                f"model.norm_statistics lane needs whole ones: use one of {list(divisors(math.gcd(rows, lanes)))}"
            )
        object.__setattr__(self, "train", train)  # settings are frozen once they are whole
        return self

    @model_validator(mode="after")
    def _grid_can_vary(self) -> Settings:
        for name, values in self.compare.grid.items():
            if listed := [value for value in values if isinstance(value, (dict, list, tuple))]:
                raise ValueError(
                    f"compare cannot vary {name} over {listed[0]!r}: an arm is named after its values, which are single"
                )
        for name in (*self.compare.grid, *self.compare.tune):
            if name in SET_BY_COMPARE:
                raise ValueError(f"{name} cannot vary: {SET_BY_COMPARE[name]}")
            self._require_variable(name, "compare")
        return self

    @model_validator(mode="after")
    def _options_are_of_an_own_network(self) -> Settings:
        networks = [str(name) for name in self.compare.grid.get("model.network", (self.model.network,))]
        own = [name for name in networks if is_import_path(name)]
        if self.model.options and not own:
            raise ValueError(
                f"model.options is for a network of your own, and model.network is {networks[0]}: take it out, or "
                "write model.network as module:function"
            )
        unread = [name for name in OF_OUR_NETWORKS if f"model.{name}" in self.compare.grid]
        if unread and own == networks:
            raise ValueError(
                f"compare cannot vary model.{unread[0]}, which {own[0]} does not get: vary model.options.{unread[0]}, "
                "if its function has that parameter"
            )
        return self

    @model_validator(mode="after")
    def _search_can_tune(self) -> Settings:
        for name in self.compare.tune:
            if name in SET_BY_SEARCH:
                raise ValueError(
                    f"compare.tune cannot choose {name}, which the search sets for its own short trials: take it out, "
                    "and its values make arms"
                )
        return self

    @model_validator(mode="after")
    def _space_can_vary(self) -> Settings:
        for name in self.tune.space:
            if name in SET_BY_TUNE:
                raise ValueError(f"tune cannot choose {name}, {SET_BY_TUNE[name]}: take it out of tune.space")
            self._require_variable(name, "tune")
        if {"train.rank_batch_size", "train.batch_size"} <= self.tune.space.keys():
            raise ValueError(
                "tune.space has train.rank_batch_size and train.batch_size, that both say the batch size: use one"
            )
        if self.tune.space and self.tune.search_on == self.train.evaluate_on and self.tune.confirm:
            raise ValueError(
                f"tune.search_on and train.evaluate_on are both {self.tune.search_on!r}: values that are chosen on the "
                "split that judges them seem better than they are: set one of them to another split"
            )
        if self.tune.confirm and self.tune.space and self.train.seed in self.tune.confirm_seeds:
            raise ValueError(
                f"tune.confirm_seeds has {self.train.seed}, which is train.seed: the trials of the search have it, and "
                "a new seed alone can tell whether chance chose the best"
            )
        return self

    @staticmethod
    def _require_variable(name: str, command: str) -> None:
        """Raise ValueError unless `compare` or `tune` can vary a setting of this name."""
        section, _, rest = name.partition(".")
        if section not in VARIABLE or not rest or not dotted.is_setting(Settings, name):
            hint = dotted.nearest(Settings, name)
            known = hint not in ("", name) and hint.partition(".")[0] in VARIABLE
            also = f"; did you mean {hint}?" if known else f": settings of {', '.join(VARIABLE)} can"
            raise ValueError(f"{command} cannot vary {name!r}{also}")

    @property
    def listed(self) -> tuple[str, ...]:
        """Names of settings that were loaded with a list in the place of their value."""
        return self._listed

    def require_single_run(self) -> None:
        """Refuse settings of which there is more than one training, for what trains once.

        A grid beside a single value (``compare.grid``) is no such list: the single value is what is trained.

        Raises
        ------
        SettingsError
            A list stands in the place of a setting's value.
        """
        if self._listed:
            name, values = self._listed[0], list(self.compare.grid[self._listed[0]])
            raise SettingsError(
                f"{name} lists {values}, which `compare` trains one by one: choose one, "
                f"for example -o {name}={yaml_text.write(values[0])}"
            )

    def with_values(self, values: Mapping[str, Any]) -> Settings:
        """Return these settings with such values, checked as a whole, and nothing left to compare or to tune.

        The batch size of a worker is held where it was given, that of all workers where that was.

        Parameters
        ----------
        values : value of each setting by its dotted name

        Raises
        ------
        SettingsError
            A value cannot be used, alone or with the others.
        """
        tree = self.model_dump()
        tree["compare"], tree["tune"] = {**tree["compare"], "grid": {}}, {**tree["tune"], "space": {}}
        if "train.batch_size" in values:
            tree["train"]["rank_batch_size"] = None
        elif "train.rank_batch_size" in values or tree["train"]["rank_batch_size"] is not None:
            tree["train"]["batch_size"] = None
        for name, value in values.items():
            dotted.put(Settings, tree, name, value)
        varies_options = any(name.startswith("model.options.") for name in values)
        if not varies_options and not is_import_path(str(tree["model"]["network"])):
            tree["model"]["options"] = {}  # they are of the other networks of this study
        try:
            return Settings.model_validate(tree)
        except ValidationError as error:
            arm = ", ".join(f"{name}={value}" for name, value in values.items())
            raise SettingsError(explain(error, f"with {arm}")) from None


def digest_of(value: Any) -> str:
    """Return the SHA-256 of a JSON-able value or a settings section, as ``sha256:<64 hex digits>``."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def explain(error: ValidationError, where: object) -> str:
    """One line for each setting that cannot be used: where it stands, its name, the value, and what would be right.

    Secrets are masked.
    """
    of_setting: dict[str, list[Any]] = {}
    for item in error.errors():
        of_setting.setdefault(".".join(map(str, filter(_is_name, item["loc"]))), []).append(item)
    return "\n".join(" ".join(mask(_explain(*entry, where)).split()) for entry in of_setting.items())


def _is_name(part: int | str) -> bool:
    """Whether a part of a location is of a setting, and not pydantic's name for one of the types that it may have."""
    return str(part).partition("[")[0] not in ("literal", "tuple", "bool", "int", "float", "str")


def _explain(name: str, items: list[Any], where: object) -> str:
    """The line of one setting; it has several errors where it may be of several types and is of none."""
    kind, given = items[0]["type"], items[0]["input"]
    if kind == "extra_forbidden":
        if hint := dotted.nearest(Settings, name):
            return f"{where}: unknown setting {name}; did you mean {hint}?"
        return f"{where}: unknown setting {name}; `sparknorm settings` with the same -c prints all that there are"
    if kind == "missing":
        few = f" in {masked(given, name)!r}" if isinstance(given, (list, tuple)) else ""
        return f"{where}: setting {name} is missing{few}"
    if kind == "value_error":
        return f"{where}: {name + ': ' if name else ''}{items[0]['msg'].removeprefix('Value error, ')}"
    expected = " or ".join(dict.fromkeys(_expected(item) for item in items))
    return f"{where}: {name}: Input should be {expected}, got {masked(given, name)!r}"


def _expected(item: Any) -> str:
    """What pydantic says a value should be, in the words of a YAML file."""
    words = {
        "tuple_type": "a list, such as [a, b]",
        "dict_type": "a mapping, such as {a: b}",
        "model_type": "a section",
    }
    return words.get(item["type"], item["msg"].removeprefix("Input should be "))
