"""What a path or URL stands for: the fsspec filesystem, and the path in its own terms."""

from __future__ import annotations

import inspect
import re
import socket
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.storage.outage import UnreachableError

# A scheme, and one slash where a URL has two: Spark and Databricks read dbfs:/mnt/x so, and fsspec takes it for a local
# folder of that name.
_ONE_SLASH = re.compile(r"(?!file:)([A-Za-z][A-Za-z0-9+.-]+):/(?!/)")
# To fsspec `::` joins filesystems, and of a path `a::b` it opens `a`. A URL that is read through a cache is the one
# chain that stands for the path in it.
_CACHE = re.compile(r"^(simplecache|filecache|blockcache)::(?=[A-Za-z][A-Za-z0-9+.-]*://)")
# Drivers that connect when they are made (FTP, GitHub) say by these that nobody answers now.
_NOBODY_ANSWERS = (ConnectionError, TimeoutError, socket.gaierror)


class AddressError(ValueError):
    """No filesystem can be found for a path or URL; the message says what would be right."""


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of ``path`` and the path in its own terms (absolute for a local one).

    Raises
    ------
    AddressError
        It is written as Spark writes it, has ``::`` in it, its protocol is not known, or its driver is not installed or
        needs more than a URL says.
    UnreachableError
        Its driver connects at once, and nobody answers.
    """
    check_written(str(path))
    try:
        fs, inner = fsspec.core.url_to_fs(str(path))
    except _NOBODY_ANSWERS as error:
        raise UnreachableError(f"{path} cannot be reached from {socket.gethostname()}: {_first_line(error)}") from error
    except (TypeError, ImportError, ValueError, OSError) as error:  # what drivers raise that cannot be made
        hint = "; on Databricks write /dbfs/..., or /Volumes/..." if str(path).startswith("dbfs:") else ""
        raise AddressError(f"{path} cannot be opened: {_first_line(error)}{hint}") from error
    return fs, inner


def check_written(path: str) -> None:
    """Check that fsspec takes a path or URL for what it says.

    Raises
    ------
    AddressError
        It would open another one.
    """
    if one_slash := _ONE_SLASH.match(path):
        scheme, rest = one_slash[1], path[one_slash.end() :]
        right = f"/dbfs/{rest}, its mount" if scheme == "dbfs" else f"{scheme}://{rest}"
        raise AddressError(f"{path} is neither a path nor a URL: write {right}")
    if "::" in _CACHE.sub("", path, count=1):
        raise AddressError(
            f"{path} has :: in it, which fsspec takes for a chain of filesystems, and it would open another folder: "
            "give the folder or the host a name without ::"
        )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__


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
