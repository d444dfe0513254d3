"""One Markdown page of every setting, made from the models: ``python -m pipeline.config.reference > settings.md``."""

from __future__ import annotations

import inspect
import sys
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, JsonValue, WrapValidator
from pydantic.fields import FieldInfo

from pipeline.config.settings import Settings
from pipeline.config.yaml_text import write

_TYPES = {int: "integer", float: "number", bool: "true or false", str: "text", JsonValue: "any value"}
_PLURALS = {int: "integers", float: "numbers", str: "texts"}
_BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
_HEADINGS = ("setting", "type", "default", "range", "description")


def reference_page() -> str:
    """The page: a table for each section, a row for each setting, its dotted name as one writes it after ``-o``."""
    return f"# Settings\n\n{inspect.getdoc(Settings)}\n\n{_table(Settings, '')}\n{_sections(Settings, '')}"


def _sections(model: type[BaseModel], prefix: str) -> str:
    parts = []
    for name, field in model.model_fields.items():
        section = field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            heading = f"## {prefix}{name}\n\n{inspect.getdoc(section)}\n"
            parts.append(f"{heading}\n{_table(section, f'{prefix}{name}.')}\n{_sections(section, f'{prefix}{name}.')}")
    return "".join(parts)


def _table(model: type[BaseModel], prefix: str) -> str:
    rows = [_HEADINGS, tuple("---" for _ in _HEADINGS)]
    for name, field in model.model_fields.items():
        if not hasattr(field.annotation, "model_fields"):
            description = (field.description or "").replace("|", "\\|")
            kind = _type(field.annotation) + _or_auto(field)
            rows.append((f"`{prefix}{name}`", kind, _default(field), _range(field), description))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if kind is NoneType else _type(kind) for kind in arguments)
    if origin is Literal:
        return "one of " + ", ".join(f"`{write(value)}`" for value in arguments)
    if origin is tuple and arguments[0] is Any:
        return "list"
    if origin is tuple:
        count = "" if arguments[-1] is Ellipsis else f"{len(arguments)} "
        return f"list of {count}{_PLURALS.get(arguments[0]) or _type(arguments[0])}"
    if origin is dict:
        return f"mapping of {_type(arguments[0])} to {_type(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation.__name__.lower()
    return _TYPES[annotation]


def _or_auto(field: FieldInfo) -> str:
    """Settings that take `auto` beside a number are the ones whose validation is wrapped."""
    return " or `auto`" if any(isinstance(rule, WrapValidator) for rule in field.metadata) else ""


def _default(field: FieldInfo) -> str:
    return "required" if field.is_required() else f"`{write(field.get_default(call_default_factory=True))}`"


def _range(field: FieldInfo) -> str:
    bounds = [
        f"{words} {write(value)}"
        for rule in field.metadata
        for name, words in _BOUNDS.items()
        if (value := getattr(rule, name, None)) is not None
    ]
    return ", ".join(bounds) or ("not empty" if any(getattr(rule, "min_length", 0) for rule in field.metadata) else "")


if __name__ == "__main__":
    sys.stdout.write(reference_page())
