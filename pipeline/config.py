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


class SettingsError(ValueError):
    """A setting is missing, unknown, or has a value that cannot be used."""


class ModelSettings(Section):
    """The network and its normalization."""

    network: str = Field("cnn", description="a name registered in models/")
    norm: str = Field("batch", description="a name registered in models/norms.py")
    depth: int = Field(3, ge=1, description="cnn: number of convolutions; resnet: 6n + 2 layers")
    width: int = Field(16, ge=1, description="channels of the first stage; each later stage doubles them")
    norm_groups: int = Field(8, ge=1, description="groups of the `group` norm")
    norm_eps: float = Field(1e-5, gt=0)
    norm_momentum: float = Field(
        0.1, gt=0, le=1, description="weight of the new batch in the running statistics (torch's sense)"
    )


class AugmentSettings(Section):
    """Random changes to training images, made on the device, the same for any number of workers."""

    flip: bool = Field(False, description="mirror left-right with probability one half")
    shift: int = Field(0, ge=0, description="shift by up to this many pixels each way, zeros moving in")


class TrainSettings(Section):
    """One training run."""

    seed: int = Field(0, ge=0, description="seed of the initial weights, the order of rows and augmentation")
    epochs: int = Field(4, ge=1)
    batch_size: int = Field(256, ge=1, description="images of one step over all workers: the global batch")
    lanes: int = Field(16, ge=1, description="fixed parts of every epoch; the number of workers divides it")
    shuffle_row_groups: int = Field(4, ge=1, description="rows are shuffled over windows of this many row groups")
    learning_rate: float = Field(0.1, gt=0, description="peak learning rate of the schedule")
    warmup_epochs: float = Field(0.5, ge=0, description="epochs of linear warm-up before the cosine decay to 0")
    momentum: float = Field(0.9, ge=0, lt=1, description="Nesterov momentum of SGD")
    weight_decay: float = Field(5e-4, ge=0, description="not applied to norm parameters and biases")
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    augment: AugmentSettings = AugmentSettings()
    evaluate_on: str = Field("test", description="split that is evaluated during and after training")
    evaluations_per_epoch: int = Field(1, ge=1, description="evaluations in an epoch, the last at its end")
    evaluation_batch_size: int = Field(500, ge=1, description="images in a forward pass of evaluation, per worker")
    bf16: bool = Field(False, description="autocast the forward pass to bfloat16")
    channels_last: bool = Field(True, description="NHWC memory layout")
    accumulate: int = Field(
        1, ge=1, description="parts of a worker's batch that are computed one after the other, to save memory"
    )
    gradient_compression: Literal["none", "bf16"] = Field(
        "none", description="bf16: workers exchange gradients in half the bytes, rounded to bfloat16"
    )
    on_divergence: Literal["mark", "fail"] = Field(
        "mark", description="a loss that is not finite ends the run; mark: as diverged, and a comparison goes on; fail"
    )

    @model_validator(mode="after")
    def _batch_is_cut_into_lanes(self) -> TrainSettings:
        if self.batch_size % self.lanes:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of lanes {self.lanes}: "
                f"use {max(1, round(self.batch_size / self.lanes)) * self.lanes}, or other lanes"
            )
        return self


class CheckpointSettings(Section):
    """When the state of a training is saved, beside the training. One more is saved at the end of every epoch."""

    every_steps: int | None = Field(None, ge=1, description="optimizer steps between two checkpoints; null: by time")
    every_seconds: float = Field(60, gt=0, description="seconds between two checkpoints, where every_steps is null")
    keep: int = Field(2, ge=1, description="newest checkpoints that are kept")


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
    tracking: TrackingSettings = TrackingSettings()
    spark: SparkSettings = SparkSettings()

    @model_validator(mode="after")
    def _workers_divide_lanes(self) -> Settings:
        if self.train.lanes % self.workers.count:
            fits = [n for n in range(1, self.train.lanes + 1) if self.train.lanes % n == 0]
            raise ValueError(
                f"workers.count {self.workers.count} does not divide train.lanes {self.train.lanes}: use one of {fits}"
            )
        rows = self.train.batch_size // self.workers.count
        if rows % self.train.accumulate:
            raise ValueError(
                f"train.accumulate {self.train.accumulate} does not divide a worker's {rows} images of a batch"
            )
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
