"""Settings of a registered model, and of the gate between it and the one in use."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from pipeline.config.cluster import LONGEST_WAIT_SECONDS
from pipeline.config.frozen import FrozenModel

# MLflow stores 256 letters, and the page of a registration is a file of this name and a few letters more.
_LONGEST = 240


def check_model_name(name: str) -> str:
    """The name of a registered model as it is.

    Raises
    ------
    ValueError
        No registry takes it.
    """
    parts = name.split(".")
    if len(name.encode()) > _LONGEST:
        raise ValueError(
            f"{name[:20]}... has {len(name.encode())} bytes: the name of a registered model has {_LONGEST} at most"
        )
    if not name.strip() or set(name) & set("/:\\@'") or not all(part.strip() for part in parts):
        raise ValueError(
            f"{name!r} cannot be the name of a registered model: write it without / : \\ @ and ', in Unity Catalog as "
            "catalog.schema.model"
        )
    return name


class RegistrySettings(FrozenModel):
    """A trained network becomes a version of a registered model, and takes the champion's place if the gate lets it.

    The gate shows both the same images, those of a split that neither was trained on.
    """

    model: str | None = Field(
        None, description="registered model in MLflow, catalog.schema.model in Unity Catalog; null: `name` of the study"
    )
    uri: str | None = Field(
        None, description="model registry, such as databricks-uc; null: the one that belongs to tracking.uri"
    )
    take: Literal["auto", "comparison", "train"] = Field(
        "auto",
        description="comparison: the best arm of comparison.json in the output folder; train: the newest training of "
        "`train`; auto: the comparison if there is one, else the training",
    )
    run: Literal["median", "best", "first"] = Field(
        "median",
        description="which seed of the best arm: the one in the middle by the comparison's metric, the highest (chosen "
        "on the split that judges, so a little luckier than it will be), or the first",
    )
    gate: bool = Field(True, description="false: the aliases move whatever the gate finds, and the version says so")
    split: str | None = Field(None, description="split of the dataset that the gate uses; null: train.evaluate_on")
    most_images: int = Field(10_000, ge=1, description="the gate uses at most so many, the first ones of the split")
    require: Literal["not_worse", "better"] = Field(
        "not_worse",
        description="not_worse: the challenger may be as accurate as the champion; better: it must be more accurate "
        "beyond chance (see significance)",
    )
    max_accuracy_drop: float = Field(
        0.005, ge=0, lt=1, description="the challenger fails if it is less accurate than the champion by more than this"
    )
    significance: float = Field(
        0.05,
        gt=0,
        lt=1,
        description="p-value of McNemar's exact test below which a difference is no chance: a challenger that is less "
        "accurate beyond chance fails, by however little",
    )
    max_recall_drop: float = Field(
        0.05,
        ge=0,
        le=1,
        description="the challenger fails if a class loses more of its recall than this, beyond chance within the "
        "class",
    )
    max_latency_ratio: float | None = Field(
        1.5,
        gt=0,
        description="the challenger fails if a single image takes it more than this many times the champion's; null: "
        "however long",
    )

    wait_seconds: float = Field(
        600,
        ge=0,
        le=LONGEST_WAIT_SECONDS,
        description="seconds to wait for other calls of `register` that are at the same registered model",
    )

    @field_validator("model")
    @classmethod
    def _name_is_possible(cls, name: str | None) -> str | None:
        return name if name is None else check_model_name(name)
