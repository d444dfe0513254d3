"""Settings of `tune`, the search for good values of settings: what it may try, how it chooses, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_serializer, model_validator

from pipeline.config.dotted import Tree
from pipeline.config.frozen import FrozenModel
from pipeline.config.seeds import check_seeds

# A single value of a setting.
Value = str | bool | int | float | None
_FIELDS = ("choices", "low", "high", "log", "step", "int", "when")
_FREE = "model.options."


class Parameter(FrozenModel):
    """What `tune` may choose for one setting: a list of values, or a range of numbers.

    A list stands for ``{choices: [...]}``.
    """

    model_config = ConfigDict(populate_by_name=True)

    choices: tuple[Value, ...] | None = Field(None, description="its values, instead of a range")
    low: int | float | None = Field(None, description="least value of a range, included")
    high: int | float | None = Field(None, description="largest value of a range, included")
    log: bool = Field(False, description="every factor is as likely as any other, not every difference")
    step: int | float | None = Field(None, gt=0, description="between two values of a range; null: any value")
    whole: bool | None = Field(
        None, alias="int", description="whole numbers alone; null: where the setting takes no others"
    )
    when: dict[str, tuple[Value, ...]] = Field(
        default_factory=dict, description="other parameter: values of it; with others this setting stays as it is"
    )

    @field_validator("when", mode="before")
    @classmethod
    def _one_value_is_a_list(cls, when: Any) -> Any:
        if not isinstance(when, dict):
            return when
        return {name: value if isinstance(value, (list, tuple)) else (value,) for name, value in when.items()}

    @model_validator(mode="after")
    def _is_a_list_or_a_range(self) -> Parameter:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log or self.step is not None:
                raise ValueError("choices and a range (low, high, log, step) exclude each other: leave out one")
            if not self.choices:
                raise ValueError("choices has no values")
            if len(set(map(repr, self.choices))) < len(self.choices):
                raise ValueError(f"choices has a value twice: {list(self.choices)}")
            return self
        if self.low is None or self.high is None:
            raise ValueError("write a list of values, or a range with low and high")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            raise ValueError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"log needs a low above 0, got {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other: leave out one, or list the values")
        return self

    @model_serializer(mode="plain")
    def _short(self) -> Any:
        """As one writes it: without what is not set."""
        if self.choices is not None and not self.when:
            return list(self.choices)
        values = {"int" if name == "whole" else name: value for name, value in dict(self).items()}
        defaults = {"log": False, "when": {}}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and value != defaults.get(name)
        }

    @property
    def words(self) -> str:
        """In words: ``none, batch`` or ``0.01 to 0.5 (log)``."""
        if self.choices is not None:
            text = ", ".join("null" if value is None else str(value) for value in self.choices)
        else:
            how = [f"steps of {self.step:g}"] if self.step is not None else ["log"] if self.log else []
            text = f"{self.low:g} to {self.high:g}" + (f" ({how[0]})" if how else "")
        conditions = [f"{name} is {' or '.join(map(str, values))}" for name, values in self.when.items()]
        return text + (f" where {' and '.join(conditions)}" if conditions else "")


class TuneSettings(FrozenModel):
    """A search finds the values of settings that are best on the validation split."""

    space: dict[str, Parameter] = Field(
        default_factory=dict,
        description="setting: a list of values, or a range {low, high, log, step, int}; with {when: {other: value}} "
        "only where another parameter has that value",
    )
    sampler: Literal["tpe", "cmaes", "random", "grid"] = Field(
        "tpe",
        description="how values are chosen: tpe: those that were good make similar ones more likely (Bergstra et al. "
        "2011); cmaes: ranges without a condition together, by CMA-ES (Hansen 2016), and all else by tpe; needs the "
        "package cmaes; random; grid: every combination once, of lists and of ranges with a step",
    )
    pruner: Literal["median", "successive_halving", "hyperband", "none"] = Field(
        "median",
        description="which trials end early; median: those whose best evaluation so far is worse than the median of "
        "complete ones; successive_halving and hyperband: all but the best reduction_factor-th at evaluations 1, 3, "
        "9, ...",
    )
    metric: Literal["auto", "accuracy", "balanced_accuracy", "cross_entropy"] = Field(
        "auto",
        description="what is maximized, at the last evaluation of a trial; auto: balanced accuracy where the largest "
        "class of search_on has more than twice its even share, else accuracy; cross_entropy is minimized: it differs "
        "where accuracies are equal, and asks for honest probabilities",
    )
    search_on: str = Field("validation", description="split that chooses; never the one that is evaluated at the end")
    trials: int | None = Field(32, ge=1, description="the search ends after so many trials, pruned ones included")
    seconds: float | None = Field(
        None, gt=0, description="no trial begins after the search has run for so long, over all its commands"
    )
    images: int | None = Field(None, ge=1, description="no trial begins after so many training images of all trials")
    seed: int = Field(0, ge=0, description="of what the sampler draws; trials train with train.seed")
    random_trials: int = Field(10, ge=1, description="tpe, cmaes: trials with random values before it learns from them")
    pruner_trials: int = Field(5, ge=1, description="median: trials that must be complete before one is pruned")
    pruner_evaluations: int = Field(1, ge=1, description="evaluations of a trial before it can be pruned")
    reduction_factor: int = Field(3, ge=2, description="successive_halving, hyperband: of so many, one goes on")
    confirm: int = Field(
        3, ge=0, description="so many of the best trials are trained again with new seeds, and the best of these is "
        "taken; 0: the best trial, which chance may have chosen"
    )  # fmt: skip
    confirm_seeds: tuple[int, ...] = Field(
        (1_000, 1_001, 1_002), min_length=1, description="seeds of these trainings; none of them is train.seed"
    )
    max_failures: int = Field(
        3,
        ge=0,
        description="trials that may fail, on their workers or since their values cannot be trained, and be left out; "
        "one more ends the search",
    )
    side_by_side: int | None = Field(
        None, ge=1, description="trials that train at once; null: as many as the slots hold (over Spark Connect: 1)"
    )
    storage: str | None = Field(
        None,
        description="SQLAlchemy URL of a database for Optuna, not the one of MLflow; null: files in the output folder",
    )

    @field_validator("space", mode="before")
    @classmethod
    def _regroup(cls, space: Any) -> Any:
        """Read both ways to write a parameter: whole, and with a dotted key for each of its fields."""
        return regrouped(space) if isinstance(space, dict) else space

    @model_validator(mode="after")
    def _conditions_can_hold(self) -> TuneSettings:
        for name, parameter in self.space.items():
            for other, values in parameter.when.items():
                parent = self.space.get(other)
                if parent is None or parent.choices is None:
                    what = "is not in tune.space" if parent is None else "is a range"
                    raise ValueError(
                        f"space.{name}: its condition names {other}, which {what}: a condition is on a parameter with "
                        "a list of values"
                    )
                if missing := [value for value in values if value not in parent.choices]:
                    raise ValueError(
                        f"space.{name}: it is for {other} = {missing[0]}, which is not among its values "
                        f"{list(parent.choices)}"
                    )
        ordered(self.space)
        return self

    @model_validator(mode="after")
    def _it_ends(self) -> TuneSettings:
        if self.trials is None and self.seconds is None and self.images is None and self.sampler != "grid":
            raise ValueError("trials, seconds and images are all null, and the search would not end: set one of them")
        if len(set(self.confirm_seeds)) < len(self.confirm_seeds):
            raise ValueError(f"confirm_seeds has a seed twice: {list(self.confirm_seeds)}")
        check_seeds("confirm_seeds", self.confirm_seeds)
        return self

    @model_validator(mode="after")
    def _cmaes_has_ranges(self) -> TuneSettings:
        ranges = [name for name, each in self.space.items() if each.choices is None and not each.when]
        if self.sampler == "cmaes" and self.space and len(ranges) < 2:
            raise ValueError(
                f"sampler cmaes searches two ranges without a condition or more, and space has {len(ranges)}: choose "
                "sampler tpe"
            )
        return self

    @model_validator(mode="after")
    def _grid_is_finite(self) -> TuneSettings:
        for name, parameter in self.space.items():
            if self.sampler == "grid" and parameter.choices is None and parameter.step is None:
                raise ValueError(f"space.{name} is a range without step, which sampler grid cannot go through: list it")
        return self


def ordered(space: Mapping[str, Parameter]) -> list[str]:
    """The names of the parameters, each after those that its condition is on, else in the order written.

    Raises
    ------
    ValueError
        Conditions are on each other in a circle.
    """
    names: list[str] = []
    while left := [name for name in space if name not in names]:
        ready = [name for name in left if all(other in names for other in space[name].when)]
        if not ready:
            raise ValueError(f"space: the conditions of {', '.join(left)} are on each other in a circle")
        names.append(ready[0])
    return names


def regrouped(space: Tree) -> Tree:
    """Parameters by setting, of a mapping whose keys may name a field of one: ``train.learning_rate.low``."""
    grouped: Tree = {}
    for key, value in space.items():
        name, field, rest = _split(str(key))
        if not field:
            grouped[name] = {"choices": value} if isinstance(value, (list, tuple)) else value
            continue
        fields = grouped.setdefault(name, {})
        if not isinstance(fields, dict):
            raise ValueError(f"{name} has a value and {field}: write a list of values, or a range with low and high")
        if field == "when" and rest:
            fields.setdefault("when", {})[rest] = value
        else:
            fields[f"{field}.{rest}" if rest else field] = value
    for name, fields in grouped.items():
        if not isinstance(fields, (dict, Parameter)):
            raise ValueError(f"{name} is {fields!r}: write a list of values, or a range with low and high")
    return grouped


def replace_parameters(space: Tree, later: Tree) -> None:
    """Take out of a space, in place, what a later one writes in another form: a list for a range, or the reverse."""
    forms = {_split(str(key))[0]: _is_choice(key) for key in later if _is_choice(key) is not None}
    for key in list(space):
        name, field, _ = _split(str(key))
        if name in forms and (field in ("", "choices") or (forms[name] and field != "when")):
            del space[key]


def _is_choice(key: str) -> bool | None:
    """Whether a key writes a list of values (True) or a part of a range (False); None of a condition."""
    field = _split(str(key))[1]
    return None if field == "when" else field in ("", "choices")


def _split(key: str) -> tuple[str, str, str]:
    """The setting that a key names, the field of its parameter, and the rest; the last two may be empty.

    No setting is called like a field but an option of one's own network.
    """
    parts = key.split(".")
    for number in range(3 if key.startswith(_FREE) else 2, len(parts)):
        if parts[number] in _FIELDS:
            return ".".join(parts[:number]), parts[number], ".".join(parts[number + 1 :])
    return key, "", ""
