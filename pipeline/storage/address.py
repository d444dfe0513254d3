"""What a path or URL stands for: the fsspec filesystem, and the path in its own terms."""

from __future__ import annotations

import inspect
import re
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

# A scheme, and one slash where a URL has two: Spark and Databricks read dbfs:/mnt/x so, and fsspec takes it for a local
# folder of that name.
_ONE_SLASH = re.compile(r"(?!file:)([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")


class AddressError(ValueError):
    """No filesystem can be found for a path or URL; the message says what would be right."""


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of ``path`` and the path in its own terms (absolute for a local one).

    Raises
    ------
    AddressError
        It is written as Spark writes it, its driver is not installed, or needs more than a URL says.
    """
    if one_slash := _ONE_SLASH.match(str(path)):
        scheme, rest = one_slash[1], str(path)[one_slash.end() :]
        right = f"/dbfs/{rest}, its mount" if scheme == "dbfs" else f"{scheme}://{rest}"
        raise AddressError(f"{path} is neither a path nor a URL: write {right}")
    try:
        fs, inner = fsspec.core.url_to_fs(str(path))
    except (TypeError, ImportError) as error:  # a driver that is made with less than it needs, or is not installed
        hint = "; on Databricks write /dbfs/..., or /Volumes/..." if str(path).startswith("dbfs:") else ""
        raise AddressError(f"{path} cannot be opened: {error}{hint}") from error
    return fs, inner


def join(root: str, *parts: str) -> str:
    """``root/part/part`` for local paths and URLs alike."""
    return "/".join([str(root).rstrip("/"), *parts])


def absolute(path: str) -> str:
    """A path that means the same in every process: local paths are made absolute, URLs stay as they are."""
    fs, inner = filesystem(path)
    return inner if isinstance(fs, LocalFileSystem) else str(path)


def is_local(path: str) -> bool:
    """Whether a path is of a disk that this machine has, or has mounted."""
    return isinstance(filesystem(path)[0], LocalFileSystem)


def check_creates(fs: Any, path: str) -> None:
    """Check that the driver of an object store can make a file only where there is none; one that cannot would
    overwrite without a word.

    Raises
    ------
    AddressError
        It is too old for that.
    """
    put = getattr(type(fs), "_pipe_file", type(fs).pipe_file)
    if "mode" not in inspect.signature(put).parameters:
        package = type(fs).__module__.partition(".")[0]
        raise AddressError(
            f"{path} cannot be claimed for one process: this version of {package} overwrites what another has just "
            "written; install a newer one (s3fs 2024.12 or later, say)"
        )
