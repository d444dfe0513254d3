"""Settings that have several values in one study -> arms, and the values that each arm chooses its best from.

``compare.grid`` maps a setting to its values. Those that ``compare.tune`` names are chosen for each arm; every
combination of the others is an arm, and the first of them is the baseline.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from pipeline.config.settings import Settings
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


def arms_of(settings: Settings) -> list[Arm]:
    """Every combination of the settings that are not tuned; the last setting varies fastest."""
    names = [name for name in settings.compare.grid if name not in settings.compare.tune]
    return [
        Arm(arm_name(values) or settings.model.norm, values, settings.with_values(values))
        for values in _combinations(settings, names)
    ]


def candidates_of(settings: Settings) -> list[Values]:
    """Every combination of the tuned settings; a single one, which may be empty, where there is nothing to choose."""
    return _combinations(settings, [name for name in settings.compare.grid if name in settings.compare.tune])


def _combinations(settings: Settings, names: list[str]) -> list[Values]:
    grid = settings.compare.grid
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]
