"""Settings of what surrounds a training: its comparison with others, its tracking in MLflow, its export."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config import weights_text
from pipeline.config.cluster import LONGEST_WAIT_SECONDS
from pipeline.config.frozen import FrozenModel
from pipeline.config.seeds import LAST_SEED, ROOM, check_seeds

LogModels = Literal["none", "final", "evaluated"]

# Seeds of the first look of `seeds: auto`: fewer say next to nothing about their spread.
FIRST_LOOK = 3
_WEIGHTS = "train.class_weights"


class CompareSettings(FrozenModel):
    """A comparison trains every arm with every seed, each arm with its own best values of the tuned settings.

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
    seeds: Literal["auto"] | tuple[int, ...] = Field(
        (0, 1, 2),
        description="every arm is trained once with each seed; fewer than three say next to nothing about their "
        "spread. auto: three, then one more at a time until the arm's difference from the baseline is certain",
    )
    max_seeds: int = Field(10, ge=FIRST_LOOK, description="the most that `seeds: auto` takes: 0, 1, 2, ...")
    metric: Literal["auto", "accuracy", "balanced_accuracy"] = Field(
        "auto",
        description="what arms are compared by, at the evaluation that counts (see checkpoint); auto: balanced "
        "accuracy where the largest class of the evaluated split has more than twice its even share, else accuracy",
    )
    checkpoint: Literal["last", "best_on_validation"] = Field(
        "last",
        description="the evaluation of each training that counts, and whose network is kept: the last, or the one that "
        "is best on search_on by search_metric (by metric, where that is accuracy); it sets train.final_network",
    )
    smallest_difference: float = Field(
        0.005,
        gt=0,
        lt=1,
        description="arms that differ by less than this are equivalent; half a point, about what another seed changes: "
        "who would not choose a seed for it need not choose a norm for it",
    )
    search_budget: float = Field(
        0.5,
        gt=0,
        description="the trials that choose the values of `tune` train at most this share of the epochs of those "
        "that are compared; what candidates that cannot be told apart leave of it goes to a second seed of them, and a "
        "third",
    )
    search_metric: Literal["cross_entropy", "accuracy"] = Field(
        "cross_entropy", description="what those trials are judged by, image by image, on `search_on`"
    )
    search_extensions: int = Field(
        2,
        ge=0,
        description="values tried beyond an edge of the grid of a single tuned number, where the one at the edge wins",
    )
    search_seed: int = Field(
        1_000,
        ge=0,
        le=LAST_SEED - ROOM,
        description="seed of those trials, apart from the seeds compared; further ones follow it",
    )
    search_on: str = Field("validation", description="split that chooses; never the one that judges")
    target_accuracy: float | None = Field(
        None,
        gt=0,
        le=1,
        description="value of the metric to which steps, images and seconds are counted; null: what the baseline's run "
        "of the same seed has at its end",
    )
    side_by_side: int | None = Field(
        None, ge=1, description="trials that train at once; null: as many as the slots hold (over Spark Connect: 1)"
    )

    @property
    def first_seeds(self) -> tuple[int, ...]:
        """The seeds that every arm is trained with."""
        return tuple(range(FIRST_LOOK)) if self.seeds == "auto" else self.seeds

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds that an arm is trained with at most."""
        return tuple(range(self.max_seeds)) if self.seeds == "auto" else self.seeds

    @field_validator("grid", mode="before")
    @classmethod
    def _weights_are_texts(cls, grid: Any) -> Any:
        """Weights of classes are one value of an arm, which its name and the table of MLflow can show."""
        values = grid.get(_WEIGHTS) if isinstance(grid, dict) else None
        if not isinstance(values, (list, tuple)):
            return grid
        texts = [weights_text.write(value) if isinstance(value, dict) and value else value for value in values]
        return {**grid, _WEIGHTS: texts}

    @model_validator(mode="before")
    @classmethod
    def _search_epochs_are_gone(cls, values: Any) -> Any:
        if isinstance(values, dict) and "search_epochs" in values:
            raise ValueError(
                f"search_epochs {values['search_epochs']!r} is no longer a setting: candidates train for as long as "
                "search_budget allows, a share of the trainings that are compared (0.5 by default)"
            )
        return values

    @model_validator(mode="after")
    def _no_doubles(self) -> CompareSettings:
        for name, values in {"seeds": self.all_seeds, **self.grid}.items():
            if not values:
                raise ValueError(f"{name} lists no value")
            if len({_value_key(value) for value in values}) != len(values):
                raise ValueError(f"{name} lists a value twice: {list(values)}")
        check_seeds("seeds", self.all_seeds)
        return self

    @model_validator(mode="after")
    def _search_has_a_seed_of_its_own(self) -> CompareSettings:
        if self.search_seed in self.all_seeds and any(len(self.grid.get(name, ())) > 1 for name in self.tune):
            raise ValueError(
                f"search_seed {self.search_seed} is among the seeds that are compared, {list(self.all_seeds)}: values "
                "would be chosen by what judges them; set another search_seed"
            )
        return self


def _value_key(value: object) -> str:
    """1 and 1.0 are one value, and 1 and true are two."""
    return repr(int(value) if isinstance(value, float) and value.is_integer() else value)


class TrackingSettings(FrozenModel):
    """Runs are tracked in MLflow."""

    uri: str = Field(
        "sqlite:///runs/mlflow.db", description="any MLflow tracking URI; it is shown without its password"
    )
    experiment: str = Field("sparknorm", min_length=1, description="MLflow experiment of the runs, made where absent")
    artifacts: str = Field("runs/mlartifacts", description="artifact root of a new experiment in a local store")
    log_models: LogModels = Field(
        "final",
        description="models that a run gets in MLflow, with metrics linked to model and dataset; final: the network "
        "that the training ends with, and its weights; evaluated: also each evaluated state with its step, the last "
        "100 and the best, which is tagged, without weights but for those in kept checkpoints; none: no model",
    )
    system_metrics: bool = Field(True, description="let MLflow sample CPU, memory and disk of the driver")
    outage_seconds: float = Field(
        120,
        ge=0,
        le=LONGEST_WAIT_SECONDS,
        description="seconds to wait at the start or end of a run for a tracking server that is down",
    )


class ExportSettings(FrozenModel):
    """A trained network is exported to these files."""

    formats: tuple[Literal["pt2", "torchscript", "onnx"], ...] | None = Field(
        None,
        min_length=1,
        description="files to write; null: pt2 (torch.export), torchscript, and onnx where its packages are installed",
    )
    fold: Literal["auto", True, False] = Field(
        "auto",
        description="fold norms into the layers before them; auto: those that can be; true: all, or it is an error",
    )

    @field_validator("fold", mode="before")
    @classmethod
    def _other_words(cls, fold: Any) -> Any:
        """Take the words that every other setting takes for true and false."""
        return {"on": True, "yes": True, "off": False, "no": False}.get(fold, fold) if isinstance(fold, str) else fold
