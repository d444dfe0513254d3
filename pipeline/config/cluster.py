"""Settings of the Spark session, and of the workers that train in it."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.frozen import FrozenModel

# The longest wait that a setting may ask for, a week: sockets count milliseconds with 32 bits, and to many calls
# infinity is an error.
LONGEST_WAIT_SECONDS = 604_800


class WorkerSettings(FrozenModel):
    """The workers of a training are the tasks of one barrier stage."""

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
    collective_timeout_seconds: float = Field(
        300, gt=0, le=LONGEST_WAIT_SECONDS, description="seconds that a rank waits at most for the others"
    )
    stall_seconds: float = Field(
        180,
        gt=0,
        le=LONGEST_WAIT_SECONDS,
        description="a worker that makes no progress for this many seconds fails the job, with its stack",
    )
    heartbeat_seconds: float = Field(
        1,
        gt=0,
        le=3600,
        description="seconds between two signs of life of a worker; on remote storage they grow to stall_seconds / 18, "
        "10 at most",
    )
    slots_wait_seconds: float = Field(
        60, ge=0, le=LONGEST_WAIT_SECONDS, description="seconds to wait for executors to register"
    )
    port: int = Field(0, ge=0, le=65535, description="port of the rendezvous on rank 0's host; 0: any free one")

    @model_validator(mode="after")
    def _fits(self) -> WorkerSettings:
        if self.min_count is not None and self.min_count > self.count:
            raise ValueError(f"min_count {self.min_count} is above count {self.count}: use at most {self.count}")
        return self


class SparkSettings(FrozenModel):
    """A session is made with these where none is given (spark-submit, a notebook and Databricks bring their own)."""

    master: str = Field(
        "local[2]",
        description="used only when no master is set from outside; sc://HOST:15002 is a Spark Connect server, as is "
        "the environment's SPARK_REMOTE",
    )
    conf: dict[str, str] = Field(
        default_factory=dict, description="more Spark properties; a number or boolean becomes text"
    )
    py_files: tuple[str, ...] = Field(
        (), description="zips and .py files, on the driver's disk, that executors import from: dist/sparknorm.zip"
    )

    @field_validator("conf", mode="before")
    @classmethod
    def _values_are_texts(cls, conf: Any) -> Any:
        if not isinstance(conf, dict):
            return conf
        return {key: json.dumps(value) if isinstance(value, (int, float)) else value for key, value in conf.items()}

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
