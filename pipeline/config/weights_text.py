"""Weights of classes as one text, ``{coat: 1.5, shirt: 2}``: a value of a grid, as an arm of a comparison has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from pipeline.config import yaml_text


def write(weights: Mapping[Any, Any]) -> str:
    """The weights in YAML, sorted by the names of the classes, so that equal ones give one text."""
    named = {str(name): weights[name] for name in weights}
    return yaml_text.write({name: _short(named[name]) for name in sorted(named)})


def read(text: str) -> dict[str, Any] | None:
    """The weights by the names of the classes; None of a text that has none, as ``balanced``."""
    if not text.lstrip().startswith("{"):
        return None
    try:
        weights = yaml_text.read(text)
    except yaml.YAMLError:
        return None
    return {str(name): weight for name, weight in weights.items()} if isinstance(weights, dict) else None


def _short(weight: Any) -> Any:
    """2 for 2.0."""
    return int(weight) if isinstance(weight, float) and weight.is_integer() else weight
