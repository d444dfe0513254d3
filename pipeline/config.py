"""One YAML file plus ``key=value`` overrides -> frozen, checked settings. The only reader of ``conf/``.

Every field has a type, a range and a sentence. An unknown key, a wrong type or a value out of range is a
`SettingsError` that names the setting, says what it got, and what would be right.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from pipeline.data_settings import DatasetSettings, ReaderSettings, Section
from pipeline.training_settings import CheckpointSettings, ModelSettings, TrainSettings


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
    """Arms x seeds, each arm with its own best learning rate of one grid."""

    norms: tuple[str, ...] = Field(("none", "batch"), min_length=1, description="the arms; the first is the baseline")
    seeds: tuple[int, ...] = Field((0,), min_length=1, description="every arm is trained once with each seed")
    learning_rates: tuple[float, ...] = Field((0.1,), min_length=1, description="the grid, the same for all arms")
    search_epochs: int = Field(1, ge=1, description="epochs of one trial of the grid search")
    search_seed: int = Field(1_000, ge=0, description="seed of the grid search, apart from the seeds compared")
    search_on: str = Field("validation", description="split that chooses the learning rate; never the test split")

    @model_validator(mode="after")
    def _no_doubles(self) -> CompareSettings:
        for name in ("norms", "seeds", "learning_rates"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} lists a value twice: {list(values)}")
        if any(rate <= 0 for rate in self.learning_rates):
            raise ValueError(f"learning_rates must all be above 0, got {list(self.learning_rates)}")
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


def digest_of(value: Any) -> str:
    """SHA-256 of a JSON-able value or a settings section, as ``sha256:<64 hex digits>``."""
    plain = value.model_dump(mode="json") if isinstance(value, BaseModel) else value
    canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return "sha256:" + hashlib.sha256(canonical.encode()).hexdigest()


def load_settings(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Settings:
    """Read one YAML file, apply ``section.key=value`` overrides, and check everything.

    Raises
    ------
    SettingsError
        The file is missing or not YAML, a key is unknown, or a value cannot be used.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        return Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError("\n".join(_explain(item, path) for item in error.errors())) from None


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


def _explain(item: Any, path: str | Path) -> str:
    location = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        hint = _nearest(item["loc"])
        return f"{path}: unknown setting {location}" + (f"; did you mean {hint}?" if hint else "")
    if item["type"] == "missing":
        return f"{path}: setting {location} is missing"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{path}: {location + ': ' if location else ''}{message}"
    return f"{path}: {location}: {message}, got {item['input']!r}"


def _nearest(location: tuple[Any, ...]) -> str:
    section: Any = Settings
    for part in location[:-1]:
        section = section.model_fields[part].annotation
    near = difflib.get_close_matches(str(location[-1]), section.model_fields, n=1, cutoff=0.4)
    return ".".join([*map(str, location[:-1]), near[0]]) if near else ""
