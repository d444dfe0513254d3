"""The reference pages that follow from the code: settings, command line, file formats, what each package offers."""

from __future__ import annotations

import importlib
import inspect
import json
import re
from pathlib import Path
from types import GenericAlias

import click
from pydantic import BaseModel
from typer.cli import get_docs_for_click
from typer.main import get_command

from pipeline.config.reference import reference_page

# The packages in the order of their layers, from what a person calls down to what everything rests on.
PACKAGES = (
    *("pipeline.study", "pipeline.serving", "pipeline.driver", "pipeline.report", "pipeline.ingest"),
    *("pipeline.training", "pipeline.tracking", "pipeline.cluster", "pipeline.data", "pipeline.distributed"),
    *("pipeline.telemetry", "pipeline.config", "models"),
)


def write_pages(folder: Path) -> None:
    """Write all pages. One whose text is as before is left alone, so that Sphinx need not read it again."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {
        "settings": reference_page(),
        "commands": command_line(),
        "comparison": json_schema("pipeline.report", "Comparison", "comparison.json"),
        "registration": json_schema("pipeline.report", "Registration", "register.json"),
        "tuning": json_schema("pipeline.report", "Tuning", "tune.json"),
        "manifest": json_schema("pipeline.data", "Manifest", "manifest.json"),
        "api": python_api(),
    }
    for name, text in pages.items():
        path = folder / f"{name}.md"
        if not path.is_file() or path.read_text() != text:
            path.write_text(text)


def command_line() -> str:
    """The page of all commands with their options, from the typer application."""
    from pipeline.__main__ import app

    command = get_command(app)
    text = get_docs_for_click(obj=command, ctx=click.Context(command, info_name="sparknorm"), name="sparknorm")
    return text.replace("# `sparknorm`", "# The command line", 1)


def json_schema(package: str, name: str, file: str) -> str:
    """The page of a file's JSON schema, from the pydantic type that writes it."""
    kind = getattr(importlib.import_module(package), name, None)
    if kind is None:
        return f"# The JSON schema of {file}\n\nIt is not described yet.\n"
    schema = json.dumps(kind.model_json_schema(mode="serialization"), indent=1)
    return f"# The JSON schema of {file}\n\nIt follows from the type `{package}.{name}`.\n\n```json\n{schema}\n```\n"


def python_api() -> str:
    """The page of what each package offers in its ``__all__``, from the docstrings."""
    parts = ["# The Python API", "Each package offers these names; nothing else is public."]
    for package in PACKAGES:
        module = importlib.import_module(package)
        offered = getattr(module, "__all__", ())
        if offered:
            parts += [f"## `{package}`", inspect.cleandoc(module.__doc__ or "")]
            parts += [_directive(f"{package}.{name}", getattr(module, name)) for name in offered]
    return "\n\n".join(parts) + "\n"


def _directive(name: str, thing: object) -> str:
    if isinstance(thing, dict):
        keys = ", ".join(f"`{key}`" for key in thing)
        return f"**`{name}`** is a dictionary with the keys {keys}."
    if isinstance(thing, GenericAlias):
        return f"**`{name}`** stands for `{thing}`."
    kind = "class" if inspect.isclass(thing) else "function"
    if inspect.isclass(thing) and issubclass(thing, Exception):
        kind = "exception"
    text = f"```{{eval-rst}}\n.. auto{kind}:: {name}\n```"
    if inspect.isclass(thing) and issubclass(thing, BaseModel):
        types = {key: inspect.formatannotation(field.annotation) for key, field in thing.model_fields.items()}
        types = {key: re.sub(r"\b(?:pipeline|typing)\.(?:\w+\.)*", "", text) for key, text in types.items()}
        text += "\n\nFields: " + ", ".join(f"`{key}` ({text})" for key, text in types.items()) + "."
    return text
