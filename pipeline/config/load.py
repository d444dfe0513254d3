"""One YAML file plus ``key=value`` overrides -> frozen, checked settings. The only reader of ``conf/``."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import dotted
from pipeline.config.settings import VARIABLE, Settings, SettingsError, explain


def load_settings(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, single_run: bool = False
) -> Settings:
    """Read one YAML file, apply ``section.key=value`` overrides, and check everything.

    Parameters
    ----------
    path : the YAML file
    overrides : ``section.key=value`` each, the value in YAML; later ones win
    single_run : for a command that trains once: a list in the place of a setting's value is an error

    Raises
    ------
    SettingsError
        The file is missing or not YAML, a key is unknown, or a value cannot be used.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    _spread(tree, path, single_run=single_run)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(explain(error, path)) from None
    names = settings.compare.grid
    try:
        for values in itertools.product(*names.values()):
            settings.with_values(dict(zip(names, values, strict=True)))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings


def _read_yaml(path: Path) -> dotted.Tree:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("conf").glob("*.yaml")))
        raise SettingsError(f"{path}: no such settings file" + (f"; there are {known}" if known else ""))
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: expected sections such as `name:` and `dataset:`, found {type(tree).__name__}")
    dotted.join_keys(Settings, tree)
    return tree


def _apply(tree: dotted.Tree, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError(f"override {override!r}: write section.key=value, for example train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"override {override!r}: {text!r} is not a YAML value") from None
    try:
        dotted.put(Settings, tree, name, value)
    except ValueError as error:
        raise SettingsError(f"override {override!r}: {error}") from None
    dotted.join_keys(Settings, tree)
    if not isinstance(value, list):
        _grid(tree).pop(name, None)  # one value where the file has several


def _spread(tree: dotted.Tree, path: str | Path, *, single_run: bool) -> None:
    """Move lists in the place of single values into ``compare.grid``."""
    for section in VARIABLE:
        for name, value in list(dotted.leaves({section: tree.get(section)})):
            if not isinstance(value, list):
                continue
            if single_run:
                raise SettingsError(
                    f"{path}: {name} lists {value}, which `compare` trains one by one: choose one, "
                    f"for example -o {name}={value[0] if value else 'VALUE'}"
                )
            _grid(tree)[name] = value
            dotted.put(Settings, tree, name, value[0] if value else None)


def _grid(tree: dotted.Tree) -> dict[str, Any]:
    """``compare.grid`` of a tree, made where it is absent; apart from the tree where it cannot be used as it stands."""
    if tree.get("compare") is None:
        tree["compare"] = {}
    compare = tree["compare"]
    if not isinstance(compare, dict):
        return {}  # said when the settings are checked
    grid = compare.setdefault("grid", {})
    return grid if isinstance(grid, dict) else {}
