"""Settings that have several values in one study -> arms, and the values that each arm chooses its best from.

``compare.grid`` maps a setting to its values. Those that ``compare.tune`` names are chosen for each arm; every
combination of the others is an arm, and the first of them is the baseline.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from pipeline.config.settings import Settings, SettingsError
from pipeline.report.comparison import Metric
from pipeline.report.names import Values, arm_name


@dataclass(frozen=True)
class Arm:
    """One combination of what is compared.

    name : of the values, in words: ``batch, depth 20``
    values : by setting; empty where nothing but the tuned settings varies
    settings : the study's, with these values
    """

    name: str
    values: Values
    settings: Settings


def with_final_network(settings: Settings, metric: Metric) -> Settings:
    """The study's settings, whose trainings end with the network that ``compare.checkpoint`` says.

    Parameters
    ----------
    metric : what the arms are compared by; it chooses where ``compare.search_metric`` is accuracy

    Raises
    ------
    SettingsError
        ``train.final_network`` says otherwise, or the split that chooses would be the one that judges.
    """
    options, name = settings.compare, "train.final_network"
    if options.checkpoint == "last":
        if settings.train.final_network != "last" and name not in options.grid:
            raise SettingsError(
                f"{name} is {settings.train.final_network}, but compare.checkpoint is last, by which all trainings "
                "of a comparison end: set compare.checkpoint to best_on_validation"
            )
        return settings
    if name in options.grid:
        raise SettingsError(f"compare.checkpoint best_on_validation sets {name}, which the grid varies: take out one")
    if options.search_on == settings.train.evaluate_on:
        raise SettingsError(
            f"compare.search_on and train.evaluate_on are both {options.search_on!r}: an evaluation that is chosen on "
            "the split that judges it makes the comparison unfair: set one of them to another split, or "
            "compare.checkpoint to last"
        )
    chosen = "lowest_loss" if options.search_metric == "cross_entropy" else f"highest_{metric}"
    train = settings.train.model_copy(update={"final_network": chosen, "select_on": options.search_on})
    return settings.model_copy(update={"train": train})


def arms_of(settings: Settings) -> list[Arm]:
    """Every combination of the settings that are not tuned; the last setting varies fastest.

    Raises
    ------
    SettingsError
        Two arms would have one name, as of classes whose names look like weights.
    """
    names = [name for name in settings.compare.grid if name not in settings.compare.tune]
    arms = [
        Arm(arm_name(values) or settings.model.norm, values, settings.with_values(values))
        for values in _combinations(settings, names)
    ]
    counts = Counter(arm.name for arm in arms)
    for arm in arms:
        if counts[arm.name] > 1:
            raise SettingsError(
                f"compare.grid: {counts[arm.name]} arms would be named {arm.name!r}, one of them of {arm.values}: "
                "leave out one, or rename a class"
            )
    return arms


def candidates_of(settings: Settings) -> list[Values]:
    """Every combination of the tuned settings; a single one, which may be empty, where there is nothing to choose."""
    return _combinations(settings, [name for name in settings.compare.grid if name in settings.compare.tune])


def _combinations(settings: Settings, names: list[str]) -> list[Values]:
    grid = settings.compare.grid
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]
