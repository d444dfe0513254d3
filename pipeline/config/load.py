"""One YAML file plus ``key=value`` overrides -> frozen, checked settings. The only reader of ``conf/``.

A file states what differs from the defaults, or, with ``extends: other.yaml``, from another file: sections are merged,
lists and single values replace those of the other file.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from pipeline.config import dotted, yaml_text
from pipeline.config.settings import VARIABLE, Settings, SettingsError, explain


def load_settings(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, single_run: bool = False
) -> Settings:
    """Read one YAML file and those that it extends, apply ``section.key=value`` overrides, and check everything.

    Parameters
    ----------
    path : the YAML file; what it extends is found from its folder
    overrides : ``section.key=value`` each, the value in YAML; later ones win
    single_run : for what trains once: a list in the place of a setting's value is an error

    Raises
    ------
    SettingsError
        A file is missing, not YAML, or extends itself; a key is unknown, or a value cannot be used.
    """
    tree = _read_file(Path(path))
    for override in overrides:
        _apply(tree, override)
    listed = _spread(tree)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(explain(error, path)) from None
    settings._listed = listed
    names = settings.compare.grid
    try:
        if single_run:
            settings.require_single_run()
        for values in itertools.product(*names.values()):
            settings.with_values(dict(zip(names, values, strict=True)))
    except SettingsError as error:
        raise SettingsError(f"{path}: {error}") from None
    return settings


def _read_file(path: Path, extended_by: tuple[Path, ...] = ()) -> dotted.Tree:
    """The tree of a file and of those that it extends; ``extended_by`` is how one came here, the first file first."""
    tree = _read_yaml(path)
    if "extends" not in tree:
        return tree
    other = tree.pop("extends")
    if not isinstance(other, str):
        raise SettingsError(f"{path}: extends: write the path of one other file, got {other!r}")
    base, chain = path.parent / other, (*extended_by, path)
    if not base.is_file():
        raise SettingsError(f"{path}: extends {other}, and there is no such file in {path.parent.resolve()}")
    if any(base.samefile(file) for file in chain):
        raise SettingsError(f"{path}: extends {other} in a circle: {' -> '.join(map(str, (*chain, base)))}")
    merged = _read_file(base, chain)
    for name, value in dotted.leaves(tree):
        _drop_from_grid(merged, name, value)
    return _merge(merged, tree)


def _merge(base: dotted.Tree, tree: dotted.Tree) -> dotted.Tree:
    both = {
        key: _merge(base[key], value)
        for key, value in tree.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **tree, **both}


def _read_yaml(path: Path) -> dotted.Tree:
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("conf").glob("*.yaml")))
        raise SettingsError(f"{path}: no such settings file" + (f"; there are {known}" if known else ""))
    text = path.read_text(encoding="utf-8")
    try:
        tree, texts = yaml_text.read(text), yaml_text.read(text, as_texts=True)
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {error}") from None
    if not isinstance(tree, dict):
        raise SettingsError(f"{path}: expected sections such as `name:` and `dataset:`, found {type(tree).__name__}")
    if isinstance(tree.get("spark"), dict) and isinstance(tree["spark"].get("conf"), dict):
        tree["spark"]["conf"] = texts["spark"]["conf"]
    _write_out(tree)
    return tree


def _apply(tree: dotted.Tree, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise SettingsError(f"override {override!r}: write section.key=value, for example train.epochs=3")
    try:
        value = yaml_text.read(text, as_texts=f"{name}.".startswith("spark.conf."))
    except yaml.YAMLError:
        raise SettingsError(f"override {override!r}: {text!r} is not a YAML value") from None
    try:
        dotted.put(Settings, tree, name, value)
    except ValueError as error:
        raise SettingsError(f"override {override!r}: {error}") from None
    _write_out(tree)
    _drop_from_grid(tree, name, value)


def _write_out(tree: dotted.Tree) -> None:
    """Replace the short ways to write settings by the long ones."""
    dotted.join_keys(Settings, tree)
    if isinstance(tree.get("reader"), str):
        tree["reader"] = {"kind": tree["reader"]}


def _drop_from_grid(tree: dotted.Tree, name: str, value: Any) -> None:
    """Take a setting out of ``compare.grid`` that gets one value where the tree has several."""
    if not isinstance(value, list):
        _grid(tree).pop(name, None)


def _spread(tree: dotted.Tree) -> tuple[str, ...]:
    """Move lists in the place of single values into ``compare.grid``, and return the names of those settings."""
    listed = []
    for section in VARIABLE:
        for name, value in list(dotted.leaves({section: tree.get(section)})):
            if isinstance(value, list):
                _grid(tree)[name] = value
                dotted.put(Settings, tree, name, value[0] if value else None)
                listed.append(name)
    return tuple(listed)


def _grid(tree: dotted.Tree) -> dotted.Tree:
    """``compare.grid`` of a tree, made where it is absent; apart from the tree where it cannot be used as it stands."""
    if tree.get("compare") is None:
        tree["compare"] = {}
    compare = tree["compare"]
    if not isinstance(compare, dict):
        return {}  # said when the settings are checked
    grid = compare.setdefault("grid", {})
    return grid if isinstance(grid, dict) else {}
