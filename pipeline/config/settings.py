"""One YAML file plus ``key=value`` overrides -> frozen, checked settings. The only reader of ``conf/``.

Every field has a type, a range and a sentence. An unknown key, a wrong type or a value out of range is a
`SettingsError` that names the setting, says what it got, and what would be right.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipeline.config.dataset import DatasetSettings, ReaderSettings, Section
from pipeline.config.training import CheckpointSettings, ModelSettings, TrainSettings

# Sections whose settings may have several values in one study.
VARIABLE = ("model", "train", "reader", "workers")


class SettingsError(ValueError):
    """A setting is missing, unknown, or has a value that cannot be used."""


class WorkerSettings(Section):
    """The barrier stage."""

    count: int = Field(2, ge=1, description="ranks: barrier tasks, one process and one GPU (if any) each")
    threads: int = Field(1, ge=1, description="torch threads of each rank on CPU")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: the GPU that Spark assigned to the task, else CPU"
    )
    task_cpus: int | None = Field(
        None, ge=1, description="cores that each worker takes of its executor; null: as every task, spark.task.cpus"
    )
    task_gpus: int | None = Field(
        None,
        ge=1,
        description="GPUs that Spark assigns to each worker, which computes on the first; null: as every task",
    )
    min_count: int | None = Field(
        None, ge=1, description="go on with fewer workers, down to this many, when executors are gone; null: fail"
    )
    collective_timeout_seconds: float = Field(300, gt=0, description="bound on every wait of one rank for the others")
    stall_seconds: float = Field(
        180, gt=0, description="a worker that makes no progress for this long fails the job, with its stack"
    )
    heartbeat_seconds: float = Field(1, gt=0, description="time between two signs of life of a worker")
    slots_wait_seconds: float = Field(60, ge=0, description="how long to wait for executors to register")
    port: int = Field(0, ge=0, le=65535, description="port of the rendezvous on rank 0's host; 0: any free one")

    @model_validator(mode="after")
    def _fits(self) -> WorkerSettings:
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is above count {self.count}: use at most {self.count}")
        return self


class CompareSettings(Section):
    """Arms x seeds, each arm with its own best values of the tuned settings.

    A list in place of a setting's value (``model.norm: [none, batch]``) is the same as an entry of ``grid``.
    """

    grid: dict[str, tuple[Any, ...]] = Field(
        default_factory=dict,
        description="setting: values; every combination is an arm, the first is the baseline. A setting that is "
        "overridden with one value leaves the grid",
    )
    tune: tuple[str, ...] = Field(
        ("train.learning_rate",), description="settings of the grid that make no arms: each arm has its own best value"
    )
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="every arm is trained once with each seed")
    search_epochs: int = Field(1, ge=1, description="epochs of one trial that chooses the values of `tune`")
    search_seed: int = Field(1_000, ge=0, description="seed of those trials, apart from the seeds compared")
    search_on: str = Field("validation", description="split that chooses; never the one that judges")
    target_accuracy: float | None = Field(
        None, gt=0, le=1, description="steps, images and seconds to this; null: the best that the baseline reached"
    )
    side_by_side: int | None = Field(
        None, ge=1, description="trials that train at once; null: as many as the slots hold (over Spark Connect: 1)"
    )

    @model_validator(mode="after")
    def _no_doubles(self) -> CompareSettings:
        for name, values in {"seeds": self.seeds, **self.grid}.items():
            if not values:
                raise ValueError(f"{name} lists no value")
            if len({repr(value) for value in values}) != len(values):
                raise ValueError(f"{name} lists a value twice: {list(values)}")
        return self


class TrackingSettings(Section):
    """MLflow."""

    uri: str = Field("sqlite:///runs/mlflow.db", description="any MLflow tracking URI")
    experiment: str = Field("sparknorm", min_length=1)
    artifacts: str = Field("runs/mlartifacts", description="artifact root of a new experiment in a local store")
    system_metrics: bool = Field(True, description="let MLflow sample CPU, memory and disk of the driver")
    outage_seconds: float = Field(
        120, ge=0, description="how long to wait at the start or end of a run for a tracking server that is down"
    )


class SparkSettings(Section):
    """How to get a session where none is given (spark-submit, a notebook and Databricks bring their own)."""

    master: str = Field(
        "local[2]",
        description="used only when no master is set from outside; sc://HOST:15002 is a Spark Connect server, as is "
        "the environment's SPARK_REMOTE",
    )
    conf: dict[str, str] = Field(default_factory=dict, description="more Spark properties")
    py_files: tuple[str, ...] = Field(
        (), description="zips and .py files, on the driver's disk, that executors import from: dist/sparknorm.zip"
    )

    @field_validator("py_files")
    @classmethod
    def _can_be_imported_from(cls, files: tuple[str, ...]) -> tuple[str, ...]:
        for file in files:
            if not file.endswith((".zip", ".egg", ".py")):
                raise ValueError(f"{file} is no .zip, .egg or .py file, and Python imports from no other on executors")
        return files

    @field_validator("master")
    @classmethod
    def _no_secret(cls, master: str) -> str:
        if "token=" in master:
            raise ValueError("has a token, and settings are logged: set SPARK_REMOTE in the environment instead")
        return master


class ExportSettings(Section):
    """What `export` makes of a trained network."""

    formats: tuple[Literal["pt2", "torchscript", "onnx"], ...] | None = Field(
        None,
        min_length=1,
        description="null: pt2 (torch.export) and torchscript, and onnx where its packages are installed",
    )
    fold: Literal["auto", True, False] = Field(
        "auto", description="norms into convolutions before them; auto: those that can be; true: all, or it is an error"
    )


class Settings(Section):
    """Everything one command needs, from one YAML file."""

    name: str = Field(..., min_length=1, description="name of the study; runs are named after it")
    output: str = Field("runs", description="folder for everything the commands leave")
    dataset: DatasetSettings = DatasetSettings()
    reader: ReaderSettings = ReaderSettings()
    model: ModelSettings = ModelSettings()
    train: TrainSettings = TrainSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    workers: WorkerSettings = WorkerSettings()
    compare: CompareSettings = CompareSettings()
    export: ExportSettings = ExportSettings()
    tracking: TrackingSettings = TrackingSettings()
    spark: SparkSettings = SparkSettings()

    @model_validator(mode="after")
    def _workers_divide_lanes(self) -> Settings:
        if self.train.lanes % self.workers.count:
            fits = [n for n in range(1, self.train.lanes + 1) if self.train.lanes % n == 0]
            raise ValueError(
                f"workers.count {self.workers.count} does not divide train.lanes {self.train.lanes}: use one of {fits}"
            )
        try:
            train = self.train.for_workers(self.workers.count)
        except ValueError as error:
            raise ValueError(f"train.{error}") from None
        rows, lanes = train.global_batch // self.workers.count, train.lanes // self.workers.count
        if rows % train.accumulate:
            raise ValueError(f"train.accumulate {train.accumulate} does not divide a worker's {rows} images of a batch")
        if self.model.norm_statistics == "lane" and lanes % train.accumulate:
            raise ValueError(
                f"train.accumulate {train.accumulate} does not divide a worker's {lanes} lanes, and "
                "model.norm_statistics lane needs whole ones"
            )
        object.__setattr__(self, "train", train)  # settings are frozen once they are whole
        return self

    @model_validator(mode="after")
    def _grid_can_vary(self) -> Settings:
        for name in (*self.compare.grid, *self.compare.tune):
            if name == "train.seed":
                raise ValueError("train.seed cannot vary: set compare.seeds")
            section, _, rest = name.partition(".")
            if section not in VARIABLE or not rest or not is_setting(name):
                hint = nearest(tuple(name.split(".")))
                also = (
                    f"; did you mean {hint}?" if hint not in ("", name) else f": settings of {', '.join(VARIABLE)} can"
                )
                raise ValueError(f"compare cannot vary {name!r}{also}")
        return self

    def with_values(self, values: dict[str, Any]) -> Settings:
        """These settings with values of the grid, checked as a whole, and nothing left to compare.

        The batch size of a worker is held where it was given, that of all workers where that was.

        Raises
        ------
        SettingsError
            A value cannot be used, alone or with the others.
        """
        tree = self.model_dump()
        tree["compare"] = {**tree["compare"], "grid": {}}
        if "train.batch_size" in values:
            tree["train"]["rank_batch_size"] = None
        elif "train.rank_batch_size" in values or tree["train"]["rank_batch_size"] is not None:
            tree["train"]["batch_size"] = None
        for name, value in values.items():
            *sections, leaf = name.split(".")
            node = tree
            for section in sections:
                node = node[section]
            node[leaf] = value
        try:
            return Settings.model_validate(tree)
        except ValidationError as error:
            arm = ", ".join(f"{name}={value}" for name, value in values.items())
            raise SettingsError("\n".join(_explain(item, f"with {arm}") for item in error.errors())) from None


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value or a settings section, as ``sha256:<64 hex digits>``."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def load_settings(path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, one: bool = False) -> Settings:
    """Read one YAML file, apply ``section.key=value`` overrides, and check everything.

    Parameters
    ----------
    one : for a command that trains once: a list in the place of a setting's value is an error

    Raises
    ------
    SettingsError
        The file is missing or not YAML, a key is unknown, or a value cannot be used.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    _spread(tree, path, one=one)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item, path) for item in error.errors())) from None
    names = settings.compare.grid
    try:
        for values in itertools.product(*names.values()):
            settings.with_values(dict(zip(names, values, strict=True)))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("conf").glob("*.yaml")))
        raise SettingsError(f"{path}: no such settings file" + (f"; there are {known}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: expected sections such as `name:` and `dataset:`, found {type(tree).__name__}")
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise SettingsError(f"override {override!r}: write section.key=value, for example train.epochs=3")
    *sections, leaf = key.split(".")
    node = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise SettingsError(f"override {override!r}: {section} is a value, not a section")
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"override {override!r}: {text!r} is not a YAML value") from None
    compare = tree.get("compare")
    if isinstance(compare, dict) and isinstance(compare.get("grid"), dict) and not isinstance(node[leaf], list):
        compare["grid"].pop(key, None)  # one value where the file has several


def _spread(tree: dict[str, Any], path: str | Path, *, one: bool) -> None:
    """Move lists in the place of single values into ``compare.grid``, whose own nested entries become dotted names."""
    compare = tree.get("compare")
    if compare is None:
        compare = tree["compare"] = {}
    if not isinstance(compare, dict) or not isinstance(compare.get("grid", {}), dict):
        return  # said when the settings are checked
    grid = dict(_leaves(compare.get("grid", {})))
    for section in VARIABLE:
        for name, value in _leaves({section: tree.get(section)}):
            if isinstance(value, list):
                if one:
                    raise SettingsError(
                        f"{path}: {name} lists {value}, which `compare` trains one by one: choose one, "
                        f"for example -o {name}={value[0] if value else 'VALUE'}"
                    )
                grid[name] = value
                _set(tree, name, value[0] if value else None)
    if grid:
        compare["grid"] = grid


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _set(tree: dict[str, Any], name: str, value: Any) -> None:
    *sections, leaf = name.split(".")
    for section in sections:
        tree = tree[section]
    tree[leaf] = value


def is_setting(name: str) -> bool:
    """Whether a dotted name is that of a single value."""
    section: Any = Settings
    for part in name.split("."):
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            return False
        section = field.annotation
    return not hasattr(section, "model_fields")


def _explain(item: Any, path: str | Path) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        hint = nearest(item["loc"])
        return f"{path}: unknown setting {location}" + (f"; did you mean {hint}?" if hint else "")
    if item["type"] == "missing":
        return f"{path}: setting {location} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {location + ': ' if location else ''}{message}"
    return f"{path}: {location}: {message}, got {item['input']!r}"


def nearest(location: tuple[Any, ...]) -> str:
    """The setting whose name is most like this one, in the same section; empty where none is like it."""
    section: Any = Settings
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            return ""
        section = field.annotation
    known = getattr(section, "model_fields", {})
    near = difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.4)
    return ".".join([*map(str, location[:-1]), near[0]]) if near else ""
