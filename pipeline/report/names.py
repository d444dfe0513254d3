"""Names of arms and settings: one that MLflow allows in its tables, and the words of a report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeGuard

from pipeline.config import weights_text
from pipeline.config.import_path import is_import_path, shown
from pipeline.config.secrets import mask

# A value of a setting that a study varies, and such values by the setting's dotted name.
SettingValue = str | int | float | bool | None
Values = dict[str, SettingValue]

LEARNING_RATE = "train.learning_rate"
BATCH_SIZES = ("train.rank_batch_size", "train.batch_size")
# More arms than this are told, and drawn, in groups.
MANY_ARMS = 8
_MOST_GROUPS = 9
# Weights of more classes than these are not all in the name of an arm.
_MOST_WEIGHTS = 4
# Settings whose values speak for themselves.
_SPEAKING = ("model.norm", "model.network")
_NORMS = {
    "none": "no normalization",
    "batch": "batch norm",
    "batch_renorm": "batch renorm",
    "group": "group norm",
    "layer": "layer norm",
    "instance": "instance norm",
    "switchable": "switchable norm",
    "weight_standardized_group": "group norm with weight standardization",
    "power": "power norm",
    "keep": "the network's own norms",
}


_VALUES = {
    ("train.class_weights", "none"): "no class weights",
    ("train.class_weights", "balanced"): "balanced class weights",
    ("train.sampling", "shuffled"): "shuffled sampling",
    ("train.sampling", "balanced"): "balanced sampling",
}


def arm_name(values: Values) -> str:
    """An arm is called after its values: ``batch, depth 20``; empty where there are none.

    The name has only letters that MLflow allows in the name of a metric, and the comma. Values that differ give names
    that differ, but for secrets, which no name has.
    """
    return ", ".join(_name_of(setting, value) for setting, value in values.items())


def _name_of(setting: str, value: SettingValue) -> str:
    if setting in _SPEAKING:
        return shown(_text(value)) if setting == "model.network" else _text(value)
    return f"{short_name(setting)} {_weights(value, ' ') or _text(value)}"


# Settings whose short names are also other things that runs are told by in MLflow, or other settings'.
_WHOLE = ("reader.kind", "reader.threads", "workers.threads")


def tag_name(setting: str) -> str:
    """A setting as MLflow's table has it: without its section, or whole where that would be another's name, as those of
    options of one's own network may be."""
    return setting if setting.startswith("model.options.") or setting in _WHOLE else short_name(setting)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def short_name(setting: str) -> str:
    """A setting without its section: ``rank_batch_size``, ``workers``."""
    return "workers" if setting == "workers.count" else setting.rpartition(".")[2]


def setting_words(setting: str) -> str:
    """A setting as the heading of a column: ``rank batch size``."""
    return setting.rpartition(".")[2].replace("_", " ")


def norm_words(norm: str) -> str:
    """A norm in words; one that is not known here by its own name."""
    return _NORMS.get(norm, norm.replace("_", " "))


def values_words(values: Values) -> str:
    """Values of settings in words: ``batch norm, depth 20``."""
    return ", ".join(_value_words(setting, value) for setting, value in values.items())


def _value_words(setting: str, value: SettingValue) -> str:
    if setting == "model.norm":
        return norm_words(str(value))
    if setting == "model.network" and is_import_path(str(value)):
        return str(value)
    if weights := _weights(value, " and "):
        return f"{setting_words(setting)} {weights}"
    return _VALUES.get((setting, str(value))) or arm_name({setting: value}).replace("_", " ")


def _weights(value: SettingValue, separator: str) -> str:
    """Weights of classes without braces and colons, as ``coat 1.5 shirt 2``; empty of any other value.

    Of many classes the first are named, and a few letters of a digest of all tell such weights apart.
    """
    weights = weights_text.read(value) if isinstance(value, str) else None
    if not weights:
        return ""
    named = [f"{name} {_text(weight)}" for name, weight in list(weights.items())[:_MOST_WEIGHTS]]
    more = len(weights) - len(named)
    if more:
        digest = hashlib.sha256(str(value).encode()).hexdigest()[:6]
        named.append(f"{more} more {digest}")
    return separator.join(named)


def arm_words(name: str, values: Values) -> str:
    """An arm in words. One without values has the name of its norm."""
    return values_words(values) or norm_words(name)


def group_setting(arms: Sequence[Values]) -> str | None:
    """The first setting whose values cut many arms into few groups.

    Parameters
    ----------
    arms : the values of each

    Returns
    -------
    The setting's dotted name; None where the arms are few or no setting does.
    """
    if len(arms) <= MANY_ARMS:
        return None
    for setting in arms[0]:
        groups = {repr(values[setting]) for values in arms}
        if 1 < len(groups) <= min(_MOST_GROUPS, len(arms) // 2):
            return setting
    return None


def _text(value: SettingValue) -> str:
    if value is None:
        return "null"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)  # values that differ have names that differ
    return str(value).lower() if isinstance(value, bool) else mask(str(value))
