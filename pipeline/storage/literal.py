"""What fsspec does to all files that fit a pattern, done to the one file or folder of that very name.

In a name that is given to ``rm`` or ``mv``, most drivers take ``*``, ``?`` and ``[`` for wildcards.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from glob import has_magic
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

# Files that are deleted at once.
_DELETED_AT_ONCE = 8


def remove_all(fs: Any, inner: str) -> None:
    """Delete a file, or a folder with all that is in it. Of a name with wildcards, drivers that know folders without
    files may keep empty ones.

    Raises
    ------
    FileNotFoundError
        It is not there.
    """
    if isinstance(fs, LocalFileSystem) or not has_magic(inner):
        fs.rm(inner, recursive=True)
        return
    fs.invalidate_cache(inner)
    if fs.info(inner)["type"] != "directory":
        fs.rm_file(inner)
        return
    with ThreadPoolExecutor(_DELETED_AT_ONCE, thread_name_prefix="sparknorm-remove") as pool:
        list(pool.map(lambda file: _remove_file(fs, file), fs.find(inner)))


def _remove_file(fs: Any, inner: str) -> None:
    with suppress(FileNotFoundError):
        fs.rm_file(inner)


def move(fs: Any, source: str, target: str) -> None:
    """Give a file another name, in place of the file that has it."""
    if type(fs).mv is AbstractFileSystem.mv:  # a copy of all that fits the pattern
        fs.cp_file(source, target)
        fs.rm_file(source)
    else:
        fs.mv(source, target)
