"""YAML 1.2 in and out: ``off``, ``on``, ``yes`` and ``no`` are texts, ``1e-3`` is a number, a date is a text.

PyYAML alone reads YAML 1.1, in which ``norm_scale: off`` is false and ``1e-3`` a text. Here a plain scalar means what
YAML 1.2's core schema says (https://yaml.org/spec/1.2.2/#103-core-schema).
"""

from __future__ import annotations

import re
from typing import Any

import yaml

# Tag, pattern of a plain scalar, the letters it may begin with.
_SCALARS = (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)", list("-+0123456789")),
    (
        "float",
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
        list("-+.0123456789"),
    ),
    ("merge", "<<", ["<"]),  # of YAML 1.1; anchors are little use without it
)


# Python itself reads and shows no integer of more than 4,300 digits; nothing here needs a tenth of that.
_MOST_DIGITS = 400


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """A mapping has each key once; of two, PyYAML alone would take the last without a word."""
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        marks: dict[tuple[str, str], yaml.Mark] = {}
        for key, _ in node.value:
            name, mark = (key.tag, str(key.value)), key.start_mark
            if name in marks:
                twice = f"{key.value!r} stands twice in one section, in line {marks[name].line + 1} and again"
                raise yaml.composer.ComposerError(None, None, twice, mark)
            marks[name] = mark
        return node


class _TextLoader(_Loader):
    """A loader whose scalars are all texts, as they are written: ``3.10`` stays ``3.10``."""

    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, list[Any]] = {}  # noqa: RUF012


def _integer(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > _MOST_DIGITS:
        raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)  # 010 is ten, not eight


for _kind in (_Loader, _Dumper):
    for _tag, _pattern, _first in _SCALARS:
        _kind.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), _first)
# All that YAML 1.1 or 1.2 takes for the end of a line, or does not take at all.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Between double quotes such characters are written as escapes; between others PyYAML breaks lines at them."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if _UNPRINTABLE.search(text) else None)


_Dumper.add_representer(str, _text)
_TextLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile("^<<$"), ["<"])
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)


def read(text: str, *, as_texts: bool = False) -> Any:
    """Return the value of a YAML document.

    Parameters
    ----------
    text : the document
    as_texts : leave every number, boolean and null as the text that stands there

    Raises
    ------
    yaml.YAMLError
        The text is not YAML, or has a key twice in one mapping.
    """
    return yaml.load(text, Loader=_TextLoader if as_texts else _Loader)  # both are SafeLoaders


def write(value: Any) -> str:
    """Return a JSON-able value as YAML on one line that `read` reads back."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.dump(plain, Dumper=_Dumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
