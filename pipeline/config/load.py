"""One YAML file plus ``key=value`` overrides -> frozen, checked settings. The only reader of ``conf/``.

A file states what differs from the defaults, or, with ``extends: other.yaml``, from another file: sections are merged,
lists and single values replace those of the other file. A list in the place of a single value is the same as an entry
of ``compare.grid``: what comes later (a file that extends it, an override) may write either.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import yaml
from pydantic import ValidationError

from pipeline.config import dotted, yaml_text
from pipeline.config.secrets import MASK, is_secret, mask
from pipeline.config.settings import VARIABLE, Settings, SettingsError, explain
from pipeline.config.tune import replace_parameters


def load_settings(
    path: str | Path, overrides: list[str] | tuple[str, ...] = (), *, single_run: bool = False
) -> Settings:
    """Read one YAML file and those that it extends, apply ``section.key=value`` overrides, and check everything.

    Parameters
    ----------
    path : the YAML file, or an fsspec URL of one that extends no other, as `tune` leaves it; what a file extends is
        found from its folder
    overrides : ``section.key=value`` each, the value in YAML; later ones win
    single_run : for what trains once: a list in the place of a setting's value is an error

    Raises
    ------
    SettingsError
        A file is missing, not YAML, or extends itself; a key is unknown, or a value cannot be used.
    """
    try:
        settings = _load(path, overrides)
    except RecursionError:
        raise SettingsError(f"{path}: values lie too deep in each other, or one contains itself") from None
    names = settings.compare.grid
    try:
        if single_run:
            settings.require_single_run()
        for values in itertools.product(*names.values()):
            settings.with_values(dict(zip(names, values, strict=True)))
    except SettingsError as error:
        raise SettingsError("\n".join(f"{path}: {line}" for line in str(error).splitlines())) from None
    return settings


def _load(path: str | Path, overrides: list[str] | tuple[str, ...]) -> Settings:
    tree = _read_at_url(path) if isinstance(path, str) and "://" in path else _read_file(Path(path))
    for override in overrides:
        _apply(tree, override)
    _refuse_masked(tree, path)
    listed = _spread(tree)
    try:
        settings = Settings.model_validate(tree)
    except ValidationError as error:
        raise SettingsError(explain(error, path)) from None
    settings._listed = listed
    return settings


def _read_at_url(url: str) -> dotted.Tree:
    import fsspec

    if "::" in url:
        raise SettingsError(
            f"{mask(url)} has :: in it, which fsspec takes for a chain of filesystems: use another name"
        )
    try:
        fs, inner = fsspec.core.url_to_fs(url)  # not `fsspec.open`, to which * and [ are wildcards
        content: bytes = fs.cat_file(inner)
    except FileNotFoundError:
        raise SettingsError(f"{mask(url)}: no such settings file") from None
    except Exception as error:
        raise SettingsError(f"{mask(url)} cannot be read: {_one_line(mask(str(error)))}") from error
    tree = _read_yaml(mask(url), content)
    if "extends" in tree:
        raise SettingsError(f"{mask(url)}: extends {tree['extends']}: a file at a URL cannot; put both on a local disk")
    return tree


def _read_file(path: Path, extended_by: tuple[Path, ...] = ()) -> dotted.Tree:
    """The tree of a file and of those that it extends; ``extended_by`` is how one came here, the first file first."""
    if not path.is_file():
        known = ", ".join(sorted(str(p) for p in Path("conf").glob("*.yaml")))
        raise SettingsError(f"{path}: no such settings file" + (f"; there are {known}" if known else ""))
    tree = _read_yaml(str(path), path.read_bytes())
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
    _give_way(merged, tree)
    return _merge(merged, tree)


def _merge(base: dotted.Tree, tree: dotted.Tree) -> dotted.Tree:
    both = {
        key: _merge(base[key], value)
        for key, value in tree.items()
        if isinstance(value, dict) and isinstance(base.get(key), dict)
    }
    return {**base, **tree, **both}


def _read_yaml(path: str, content: bytes) -> dotted.Tree:
    """What a settings file at this path, for messages, holds."""
    try:
        text = content.decode()
        tree, texts = yaml_text.read(text), yaml_text.read(text, as_texts=True)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} is not YAML: {_one_line(mask(str(error)))}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise SettingsError(f"{path}: expected sections such as `name:` and `dataset:`, found {found}")
    if isinstance(tree.get("spark"), dict) and isinstance(tree["spark"].get("conf"), dict):
        tree["spark"]["conf"] = texts["spark"]["conf"]
    _write_out(tree)
    lists = {name: value for name, value in dotted.leaves(tree) if isinstance(value, list)}
    for name, values in _entries(tree).items():
        if name in lists and lists[name] != values:
            raise SettingsError(
                f"{path}: {name} lists values in its own place and in compare.grid: keep one of the two"
            )
    return tree


def _apply(tree: dotted.Tree, override: str) -> None:
    name, equals, text = override.partition("=")
    where = f"override {mask(override)!r}"
    if not equals or not name:
        raise SettingsError(f"{where}: write the setting, an equals sign and its value, for example train.epochs=3")
    try:
        value = yaml_text.read(text, as_texts=f"{name}.".startswith("spark.conf."))
    except yaml.YAMLError:
        shown = MASK if is_secret(name) else mask(text)
        raise SettingsError(f"{where}: {shown!r} is not a YAML value") from None
    later: dotted.Tree = {}
    dotted.put(Settings, later, name, value)
    _write_out(later)
    _give_way(tree, later)
    try:
        dotted.put(Settings, tree, name, value)
    except ValueError as error:
        raise SettingsError(f"{where}: {_one_line(str(error))}") from None
    _write_out(tree)


def _write_out(tree: dotted.Tree) -> None:
    """Replace the short ways to write settings by the long ones."""
    dotted.join_keys(Settings, tree)
    if isinstance(tree.get("reader"), str):
        tree["reader"] = {"kind": tree["reader"]}


def _give_way(tree: dotted.Tree, later: dotted.Tree) -> None:
    """Let what a later tree says of values in a setting's place and in ``compare.grid`` count, not what this one does.

    A setting that gets one value leaves the grid. Where the later tree has an entry of the grid, that entry's values
    replace a list in the setting's own place.
    """
    lists = {name for name, value in dotted.leaves(tree) if isinstance(value, list)}
    for name, value in dotted.leaves(later):
        if not isinstance(value, list):
            entries = _entries(tree)
            for entry in [entry for entry in entries if f"{name}.".startswith(f"{entry}.")]:  # also of a mapping
                del entries[entry]
    for name, values in _entries(later).items():
        if name in lists:
            dotted.put(Settings, tree, name, values)
    replace_parameters(_entries(tree, "tune", "space"), _entries(later, "tune", "space"))


def _refuse_masked(tree: dotted.Tree, path: str | Path) -> None:
    """Refuse values that were copied from where secrets are masked: they would be wrong, and nobody would know why."""
    for name, value in dotted.leaves(tree):
        if any(isinstance(text, str) and MASK in text for text in (value if isinstance(value, list) else [value])):
            raise SettingsError(
                f"{path}: {_one_line(name)} has {MASK}, which stands where a secret was masked: write the secret itself"
            )


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _spread(tree: dotted.Tree) -> tuple[str, ...]:
    """Move lists in the place of single values into ``compare.grid``, and return the names of those settings."""
    listed = []
    for section in VARIABLE:
        for name, value in list(dotted.leaves({section: tree.get(section)})):
            # Of an option of one's own network a list may be the value, and of some settings it is: their values are
            # compared by the grid alone.
            is_value = dotted.is_in_free_mapping(Settings, name) or dotted.is_list(Settings, name)
            if isinstance(value, list) and not is_value:
                if tree.get("compare") is None:
                    tree["compare"] = {}
                if isinstance(tree["compare"], dict):
                    tree["compare"].setdefault("grid", {})
                _entries(tree)[name] = value
                dotted.put(Settings, tree, name, value[0] if value else None)
                listed.append(name)
    return tuple(listed)


def _entries(tree: dotted.Tree, section: str = "compare", name: str = "grid") -> dotted.Tree:
    """A mapping of a tree; apart from the tree where it is not there, or cannot be used as it stands."""
    holder = tree.get(section)
    entries = holder.get(name) if isinstance(holder, dict) else None
    return entries if isinstance(entries, dict) else {}  # what is wrong is said when the settings are checked
