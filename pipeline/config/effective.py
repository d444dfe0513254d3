"""The whole of a study's settings as one YAML file that explains itself."""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from pydantic import BaseModel

from pipeline.config.secrets import MASK, masked
from pipeline.config.settings import Settings
from pipeline.config.yaml_text import write

_WIDTH = 120
_HEADING = "Every setting of {}. Where `default:` stands beside a value, the value differs from the default."
_MASKED = f" {MASK} stands for a secret: write it in before this file is used."


def effective_yaml(settings: Settings) -> str:
    """Return every setting with its value as YAML that `load_settings` reads back to the same settings.

    The description of a setting is a comment above it. A value that is not the default has the default beside it.
    Secrets are masked: where there are any, the file can be read again once they are written in.
    """
    values = _section(settings)
    heading = _HEADING.format(settings.name) + (_MASKED if MASK in values else "")
    return f"{_comment(heading)}\n{values}"


def _section(section: BaseModel) -> str:
    values = masked(section.model_dump(mode="json"))
    parts = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            title = (inspect.getdoc(value) or "").partition("\n")[0]
            parts.append(f"\n{_comment(title)}{name}:\n{textwrap.indent(_section(value), '  ')}")
            continue
        default = field.get_default(call_default_factory=True)
        beside = "" if field.is_required() or value == default else f"  # default: {write(default)}"
        parts.append(f"{_comment(field.description or '')}{_entry(name, values[name], beside)}")
    return "".join(parts)


def _entry(name: str, value: Any, beside: str) -> str:
    if isinstance(value, dict) and value:
        return f"{name}:{beside}\n" + "".join(f"  {write(key)}: {write(item)}\n" for key, item in value.items())
    return f"{name}: {write(value)}{beside}\n"


def _comment(text: str) -> str:
    return "".join(f"# {line}\n" for line in textwrap.wrap(text, _WIDTH - 10))
