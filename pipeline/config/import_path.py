"""How `model.network` names a network that is not of this package: ``mypackage.nets:build``, and what it is given."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, JsonValue

# What `model.options` may hold: whatever YAML writes, at any depth.
Options = dict[str, JsonValue]

# `model.norm` of a network of one's own whose layers stay as its function has made them.
KEEP = "keep"


def is_import_path(network: str) -> bool:
    """Whether a name is that of a function or class to import, and of none of `models.NETWORKS`."""
    return ":" in network


def parts_of(network: str) -> tuple[str, str]:
    """The dotted names of the module and of what it holds."""
    module, _, attribute = network.partition(":")
    return module, attribute


def shown(network: str) -> str:
    """An import path in letters that MLflow allows in the name of a metric: ``mypackage.nets.build``."""
    return network.replace(":", ".")


def _check(network: str) -> str:
    if not is_import_path(network):
        return network
    module, attribute = parts_of(network)
    if module.endswith(".py") or "/" in module:
        path = module if module.endswith(".py") else f"{module}.py"
        name = path.rpartition("/")[2].removesuffix(".py")
        raise ValueError(
            f"{network!r} names a file, and an import path names a module: write model.network={name}:{attribute} and "
            f"spark.py_files=[{path}], or name the module of an installed package"
        )
    if not all(part.isidentifier() for name in (module, attribute) for part in name.split(".")):
        raise ValueError(f"{network!r} is no import path: write module:function, such as mypackage.nets:build")
    return network


# The name of a network of `models.NETWORKS`, or an import path that can be read.
NetworkName = Annotated[str, AfterValidator(_check)]
