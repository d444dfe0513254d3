"""Settings that have several values in one study -> arms, and the values that each arm chooses its best from.

``compare.grid`` maps a setting to its values. Those that ``compare.tune`` names are chosen for each arm; every
combination of the others is an arm, and the first of them is the baseline.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from pipeline.config.settings import Settings

Values = dict[str, Any]


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
        Arm(name_of(values) or settings.model.norm, values, settings.with_values(values))
        for values in _combinations(settings, names)
    ]


def candidates_of(settings: Settings) -> list[Values]:
    """Every combination of the tuned settings; a single one, which may be empty, where there is nothing to choose."""
    return _combinations(settings, [name for name in settings.compare.grid if name in settings.compare.tune])


def name_of(values: Values) -> str:
    """The values in words: norm and network speak for themselves, other settings are named.

    Only letters that MLflow allows in the name of a metric, and the comma.
    """
    return ", ".join(
        _text(value) if name in ("model.norm", "model.network") else f"{short_name(name)} {_text(value)}"
        for name, value in values.items()
    )


def short_name(setting: str) -> str:
    """A setting without its section: ``rank_batch_size``, ``workers``."""
    return "workers" if setting == "workers.count" else setting.rpartition(".")[2]


def _text(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)  # values that differ have names that differ
    return str(value).lower() if isinstance(value, bool) else str(value)


def _combinations(settings: Settings, names: list[str]) -> list[Values]:
    grid = settings.compare.grid
    return [dict(zip(names, values, strict=True)) for values in itertools.product(*(grid[name] for name in names))]
