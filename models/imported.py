"""A network that is not of this package: imported by ``model.network: mypackage.nets:build``, and built.

The function, or class, is called with keyword arguments alone::

    build(image_shape=(C, H, W), num_classes=10, **options)

where ``options`` are those of ``model.options``. It gets ``image_shape`` if its signature names it, and ``num_classes``
if that names it or takes any keyword. It returns a module from float images (N, C, H, W), normalized, to logits (N,
num_classes).
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import inspect
import random
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from pipeline.config.import_path import parts_of

# What sparknorm gives itself.
GIVEN = ("image_shape", "num_classes")
_LISTED = 12  # names in a message
_NOT_OWN = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<frozen ")

Build = Callable[..., Any]
# The digest of the source that each top-level module or package was imported from, in this process.
_IMPORTED: dict[str, str] = {}


class NetworkError(ValueError):
    """The network of `model.network` cannot be imported, built or trained; the message begins with its import path."""

    final = True  # another attempt would end the same way

    def __init__(self, path: str, problem: str):
        super().__init__(f"model.network {path}: {problem}")
        self.problem = problem


def build_imported(
    path: str, options: Mapping[str, Any], *, image_shape: tuple[int, int, int], num_classes: int, seed: int
) -> nn.Module:
    """Import the function of an import path and return the network that it builds.

    The random states of torch (on CPU), numpy and Python are those of the seed while it builds, and afterwards what
    they were before.

    Parameters
    ----------
    path : str
        ``module:function``; the function may be a class or lie in one.
    options : mapping
        Keyword arguments beside those of `GIVEN`.
    image_shape : tuple of 3 ints
        C, H and W in pixels.
    num_classes : int
    seed : int

    Raises
    ------
    NetworkError
        There is nothing to import there, its signature does not take the options, it raises, or returns no module.
    """
    with _seeded(seed):  # a module may draw while it is imported
        build = load(path)
    arguments = {"image_shape": tuple(image_shape), "num_classes": num_classes}
    arguments = _arguments(path, build, arguments, options)
    try:
        with _seeded(seed):
            network = build(**arguments)
    except Exception as error:
        raise NetworkError(path, f"it raised {described(error, path)}") from error
    if not isinstance(network, nn.Module):
        raise NetworkError(path, f"it returned {_kind(network)}, and must return a torch.nn.Module")
    return network


def load(path: str) -> Build:
    """Import what an import path names.

    Where the source has changed since this process imported it, it is imported anew.

    Raises
    ------
    NetworkError
        The module or the name in it is missing, importing it raises, or it cannot be called.
    """
    module_name, attribute = parts_of(path)
    top = module_name.partition(".")[0]
    if top in _IMPORTED and (_lies_elsewhere(top) or _IMPORTED[top] != source_digest(path)):
        _forget(top)
    module = _import(path, module_name)
    _IMPORTED[top] = source_digest(path)
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise NetworkError(path, f"{module_name} has no {attribute}{_nearest(attribute, module)}")
        found = getattr(found, name)
    if isinstance(found, nn.Module):
        raise NetworkError(path, f"{attribute} is a network already: name a function or class that builds one")
    if not callable(found):
        raise NetworkError(path, f"{attribute} is {_kind(found)}: name a function or class that builds a network")
    return found


def source_digest(path: str) -> str:
    """The SHA-256 of the source that a network is built by, as ``sha256:<64 hex digits>``.

    It is over all ``.py`` files of the top-level package, by their names in it, or over the file of a module that is in
    none. Where the files lie, in a folder or a zip, makes no difference.

    Raises
    ------
    NetworkError
        It cannot be imported, or has no source.
    """
    top = parts_of(path)[0].partition(".")[0]
    package = _import(path, top)
    digest = hashlib.sha256()
    count = 0
    for name, data in _sources(package):
        digest.update(f"{name} {len(data)}\n".encode() + data)
        count += 1
    if not count:
        raise NetworkError(path, f"{top} has no Python source, by which a changed network could be told")
    return f"sha256:{digest.hexdigest()}"


def source_place(path: str) -> str:
    """Where the module of an import path was imported from, for people."""
    return str(getattr(_import(path, parts_of(path)[0]), "__file__", None) or "no file")


def described(error: BaseException, path: str) -> str:
    """An error in a network's own code: its type, the first line of its message, and its file and line there.

    That is the innermost frame in the network's own package, or else the innermost that is neither torch's nor ours.
    """
    text = str(error).strip().partition("\n")[0]
    words = type(error).__name__ + (f": {text}" if text else "")
    if isinstance(error, SyntaxError):
        return f"{type(error).__name__}: {error.msg} ({Path(error.filename or '?').name}, line {error.lineno})"
    frames = traceback.extract_tb(error.__traceback__)
    folder = _folder_of(path)
    own = [frame for frame in frames if folder and frame.filename.startswith(folder)]
    # A layer of torch that does not fit, called by another one, has no line of the network's own.
    others = [frame for frame in frames if not frame.filename.startswith(_NOT_OWN)]
    place = [f" ({Path(frame.filename).name}, line {frame.lineno})" for frame in (own or others)[-1:]]
    return "".join([words, *place])


def _import(path: str, name: str) -> ModuleType:
    try:
        importlib.invalidate_caches()  # a file may be newer than the last look into its folder
        with _nothing_compiled_is_kept():
            return importlib.import_module(name)
    except Exception as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            raise NetworkError(
                path,
                f"there is no module {missing} to import here: give its .py file or zip in spark.py_files, or install "
                "it on the driver and on every executor",
            ) from error
        raise NetworkError(path, f"importing {name} raised {described(error, path)}") from error


@contextmanager
def _nothing_compiled_is_kept() -> Iterator[None]:
    """Python tells a compiled file from its source's by a time in whole seconds and a size: where a number in a network
    is changed within a second, this process and later ones would go on with the network of before."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _forget(top: str) -> None:
    """Let a module or package be imported anew."""
    for name in [name for name in sys.modules if name == top or name.startswith(f"{top}.")]:
        del sys.modules[name]


def _lies_elsewhere(top: str) -> bool:
    """Whether an import would find a module or package at another place than it was imported from."""
    importlib.invalidate_caches()
    module = sys.modules.get(top)
    if module is None or module.__spec__ is None:
        return False
    found = next((spec for finder in sys.meta_path if (spec := finder.find_spec(top, None)) is not None), None)
    return found is not None and found.origin != module.__spec__.origin


def _sources(package: ModuleType) -> Iterator[tuple[str, bytes]]:
    """Name and content of each ``.py`` file of a package, sorted; of a module alone, those of its file."""
    if hasattr(package, "__path__"):
        files = dict(_python_files(resources.files(package), ""))
        yield from ((name, files[name].read_bytes()) for name in sorted(files))
        return
    file, get_data = getattr(package, "__file__", None) or "", getattr(package.__loader__, "get_data", None)
    if file.endswith(".py") and get_data is not None:
        yield Path(file).name, get_data(file)


def _python_files(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
    for entry in folder.iterdir():
        if entry.is_dir():
            yield from _python_files(entry, f"{prefix}{entry.name}/")
        elif entry.name.endswith(".py"):
            yield f"{prefix}{entry.name}", entry


def _folder_of(path: str) -> str:
    """The folder of the network's package, or the file of its module; empty where it was not imported."""
    top = sys.modules.get(parts_of(path)[0].partition(".")[0])
    file = getattr(top, "__file__", None) or ""
    return file.removesuffix("__init__.py")


def _arguments(path: str, build: Build, given: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """What to call the function with: what it takes of what is given, and all options, which it must know."""
    try:
        parameters = inspect.signature(build).parameters.values()
    except (TypeError, ValueError):  # a builtin may have none
        return {**given, **options}
    by_keyword = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = {p.name for p in by_keyword}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if ours := [name for name in options if name in GIVEN]:
        raise NetworkError(path, f"model.options.{ours[0]} is given by sparknorm itself: take it out")
    unknown = [name for name in options if name not in names]
    if unknown and not takes_any:
        known = ", ".join(sorted(names.difference(GIVEN))) or "none"
        near = difflib.get_close_matches(unknown[0], names.difference(GIVEN), n=1)
        also = f"; did you mean {near[0]}?" if near else ""
        raise NetworkError(path, f"its signature has no {unknown[0]} (model.options); it has {known}{also}")
    if by_position := [p.name for p in parameters if p.kind is p.POSITIONAL_ONLY and p.default is p.empty]:
        raise NetworkError(path, f"it takes {by_position[0]} by position, and is called with keywords alone")
    arguments = {name: value for name, value in given.items() if name in names or (takes_any and name == "num_classes")}
    lacking = [p.name for p in by_keyword if p.default is p.empty and p.name not in {*arguments, *options}]
    if lacking:
        raise NetworkError(path, f"it needs {', '.join(lacking)}: set model.options.{lacking[0]}")
    return {**arguments, **options}


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(states[0])
            np.random.set_state(states[1])


def _nearest(attribute: str, module: ModuleType) -> str:
    own = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
    own = [name for name in own if getattr(vars(module)[name], "__module__", None) == module.__name__]
    near = difflib.get_close_matches(attribute, own, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f": it defines {', '.join(own[:_LISTED])}" if own else ""


def _kind(value: object) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
