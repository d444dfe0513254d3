"""Dotted names of settings, such as ``train.augment.flip``: the one place that takes them apart and follows them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel, JsonValue

# Nested dictionaries of settings, as YAML files hold them.
Tree = dict[str, Any]


def is_setting(model: type[BaseModel], name: str) -> bool:
    """Return whether a dotted name is that of a single value, not of a section.

    Every name in a free mapping is one: ``model.options.width``.

    Parameters
    ----------
    model : the settings that the name starts from
    """
    kind: Any = model
    for part in name.split("."):
        if _is_free(kind):
            return True
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            return False
        kind = field.annotation
    return not hasattr(kind, "model_fields")


def is_in_free_mapping(model: type[BaseModel], name: str) -> bool:
    """Return whether a dotted name lies in a setting that takes any keys and values, such as ``model.options``."""
    kind: Any = model
    for part in name.split(".")[:-1]:
        kind = getattr(getattr(kind, "model_fields", {}).get(part), "annotation", None)
        if _is_free(kind):
            return True
    return False


def is_list(model: type[BaseModel], name: str) -> bool:
    """Return whether the value of a setting may itself be a list, such as ``model.freeze``."""
    kind = _annotation(model, name)
    return any(get_origin(each) is tuple for each in (kind, *get_args(kind)))


def takes_only_integers(model: type[BaseModel], name: str) -> bool:
    """Return whether the values of a setting are whole numbers alone, as far as its type says."""
    kind = _annotation(model, name)
    kinds = set(get_args(kind)) or {kind}
    return int in kinds and not kinds & {float, str, bool}


def _annotation(model: type[BaseModel], name: str) -> Any:
    """The type of a setting; None where there is none of this name."""
    kind: Any = model
    for part in name.split("."):
        kind = getattr(getattr(kind, "model_fields", {}).get(part), "annotation", None)
    return kind


def nearest(model: type[BaseModel], name: str) -> str:
    """Return the known name of a setting that is most like this one; empty where none is.

    It is of the same section, or of another one that has a setting of just this name, ``train.learning_rate`` for
    ``learning_rate``, or an outermost section, ``model`` for ``train.model``.
    """
    *sections, last = name.split(".")
    kind: Any = model
    for part in sections:
        kind = getattr(getattr(kind, "model_fields", {}).get(part), "annotation", None)
    here = getattr(kind, "model_fields", {})
    elsewhere = [known for known in _names(model) if known.rpartition(".")[2] == last]
    near = difflib.get_close_matches(last, here, n=1, cutoff=0.4)
    if near and (not elsewhere or difflib.SequenceMatcher(None, last, near[0]).ratio() > 0.8):
        return ".".join([*sections, near[0]])
    return last if last in model.model_fields else min(elsewhere, key=lambda known: known.count("."), default="")


def _names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted name of every setting."""
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _names(field.annotation, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of a tree with its dotted name, in the order of the tree; an empty section has none."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def put(model: type[BaseModel], tree: Tree, name: str, value: Any) -> None:
    """Set a value of a tree by its dotted name, and make the sections on the way that it lacks.

    Raises
    ------
    ValueError
        What should be a section is a value.
    """
    *sections, last = _keys(model, name)
    for section in sections:
        if tree.get(section) is None:
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise ValueError(f"{section} is a value, not a section")
    tree[last] = value


def join_keys(model: type[BaseModel], tree: Tree) -> None:
    """Write nested entries of settings that are mappings with dotted keys.

    In such a setting (``compare.grid``, ``spark.conf``) ``model: {norm: [none, batch]}`` becomes
    ``model.norm: [none, batch]``.
    """
    for key, field in model.model_fields.items():
        value = tree.get(key)
        if isinstance(value, dict) and _is_mapping(field.annotation):
            tree[key] = dict(leaves(value))
        elif isinstance(value, dict) and hasattr(field.annotation, "model_fields"):
            join_keys(field.annotation, value)  # type: ignore[arg-type]


def _keys(model: type[BaseModel], name: str) -> list[str]:
    """The keys of a dotted name from the outermost section inwards; in a setting that is a mapping, the rest is one."""
    parts = name.split(".")
    kind: Any = model
    for depth, part in enumerate(parts[:-1], start=1):
        field = getattr(kind, "model_fields", {}).get(part)
        if field is None:
            break
        kind = field.annotation
        if _is_mapping(kind):
            return [*parts[:depth], ".".join(parts[depth:])]
    return parts


def _is_mapping(annotation: Any) -> bool:
    """Whether it is a mapping by dotted names; the keys of a free one are its own."""
    return get_origin(annotation) is dict and not _is_free(annotation)


def _is_free(annotation: Any) -> bool:
    return get_origin(annotation) is dict and get_args(annotation)[1] is JsonValue
