"""All files below a folder, listed by executors, or by the driver where they are few and on its own disks.

Of others the driver only looks which folders there are, down to where there are enough of them to share out; it stops
looking in a folder of many files, which one task then lists with all that is below it. Nobody holds more than a part of
a folder.
"""

from __future__ import annotations

import functools
import itertools
import os
import stat
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.ingest.sources.source import SourceError
from pipeline.storage.pages import pages

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import DataFrame, SparkSession

Value = TypeVar("Value")

# Columns of a listing: paths relative to the folder that is listed, bytes, and what changes when a file is written.
SCHEMA = "path string, size long, modified string"
# The driver goes a level deeper until it has so many folders to share out, by so many levels at most; it does not go on
# with more folders than the third number.
_FOLDERS, _LEVELS, _MOST_FOLDERS = 64, 6, 10_000
# Files of the root, and of a folder below it, at which the driver looks before it leaves all that is in it to one task.
_MOST_FILES, _MOST_FILES_BELOW = 10_000, 2_000
# Files below a local folder that the driver lists alone: a job takes a cold Spark seconds.
_MOST_BY_DRIVER = 20_000
# Entries of a folder that are looked at at once, and files of one record batch.
_PART_ROWS, _BATCH_ROWS = 1_000, 10_000


class _Folder(NamedTuple):
    """What one task lists: ``path`` below the root, "" for the root itself; ``below``: with all folders in it."""

    path: str
    below: bool


def list_files(spark: SparkSession, root: str) -> tuple[DataFrame, bool]:
    """List all files below a folder, those whose names or folders begin with a dot left out.

    Returns
    -------
    (files, fixed) : a DataFrame of `SCHEMA`, and whether its rows are fixed; otherwise it lists whenever it is read

    Raises
    ------
    SourceError
        The name of a folder in the root is not UTF-8.
    """
    folders = _shared_out(root)
    rows = _listed_here(folders, root) if storage.is_local(root) else None
    if rows is not None:
        return spark.createDataFrame(rows, SCHEMA).coalesce(1), True  # few: queries need no shuffle
    files = (
        spark.createDataFrame(folders, "folder string, below boolean")
        .repartition(min(len(folders), _FOLDERS))
        .mapInArrow(functools.partial(_list_folders, root=root), SCHEMA)
    )
    return files, False


def _listed_here(folders: list[_Folder], root: str) -> list[tuple[str, int, str]] | None:
    """The files in these folders; None where there are more than `_MOST_BY_DRIVER`."""
    import pyarrow as pa

    rows: list[tuple[str, int, str]] = []
    shared_out = pa.RecordBatch.from_pylist([folder._asdict() | {"folder": folder.path} for folder in folders])
    for batch in _list_folders(iter([shared_out]), root=root):
        rows += zip(*(column.to_pylist() for column in batch.columns), strict=True)
        if len(rows) > _MOST_BY_DRIVER:
            return None
    return rows


def _shared_out(root: str) -> list[_Folder]:
    """Folders that together have every file once: those of the fewest levels that are enough."""
    looked_at: list[_Folder] = []
    left = [""]
    for _ in range(_LEVELS):
        deeper: list[str] = []
        for number, folder in enumerate(left):
            few = len(looked_at) + len(deeper) + len(left) - number < _MOST_FOLDERS
            inside = _folders_in(root, folder) if few else None
            if inside is not None:
                looked_at.append(_Folder(folder, below=False))
            deeper += [folder] if inside is None else inside
        if len(deeper) >= _FOLDERS or deeper == left:
            left = deeper
            break
        left = deeper
    return looked_at + [_Folder(folder, below=True) for folder in left]


def _folders_in(root: str, folder: str) -> list[str] | None:
    """Paths below the root of the folders in one of its folders, sorted; None where many files are in it.

    Links to folders are followed, but for those that lead back to where they came from.
    """
    place = storage.join(root, folder) if folder else root
    files, most = 0, _MOST_FILES_BELOW if folder else _MOST_FILES
    names: list[str] = []
    for inside, others in _local_parts(root, folder) if storage.is_local(root) else _remote_parts(place):
        names += [name for name in inside if not name.startswith(".")]
        files += others
        if files > most:
            return None
    for name in names:
        if name != _as_text(name):
            if folder:
                return None  # texts in Spark are UTF-8: what is in it is listed from above it
            raise SourceError(f"{root}: the name of the folder {_as_text(name)} is not UTF-8; rename it")
    return sorted(storage.join(folder, name) if folder else name for name in names)


# A part of what is in a folder: the names of the folders in it, and how many others there are.
_Part = tuple[list[str], int]


def _local_parts(root: str, folder: str) -> Iterator[_Part]:
    place = storage.join(root, folder) if folder else root
    above = _above(root, folder) | {os.path.realpath(place)}
    with os.scandir(place) as entries:
        for part in _batched(entries, _PART_ROWS):
            inside = [entry for entry in part if os.path.isdir(entry.path)]  # noqa: PTH112
            names = [entry.name for entry in inside if os.path.realpath(entry.path) not in above]
            yield names, len(part) - len(inside)


def _remote_parts(folder: str) -> Iterator[_Part]:
    for page in pages(folder, below=False):
        names = [entry["name"].rstrip("/").rpartition("/")[2] for entry in page if entry["type"] == "directory"]
        yield names, len(page) - len(names)


def _batched(values: Iterable[Value], count: int) -> Iterator[list[Value]]:
    """Lists of so many values, the last one shorter; `itertools.batched` came with Python 3.12."""
    iterator = iter(values)
    while some := list(itertools.islice(iterator, count)):
        yield some


def _above(root: str, folder: str) -> frozenset[str]:
    """Where the root, and the folders between it and one of its folders, really are: a link below that leads to one of
    them would lead in a circle."""
    parts = folder.split("/")
    return frozenset(os.path.realpath(storage.join(root, *parts[:depth])) for depth in range(len(parts)))


def _list_folders(batches: Iterator[pa.RecordBatch], *, root: str) -> Iterator[pa.RecordBatch]:
    """On an executor: folders -> the files in them, in batches of some thousands."""
    import pyarrow as pa

    fs, inner = storage.filesystem(root)
    start, is_local = len(inner.rstrip("/")) + 1, isinstance(fs, LocalFileSystem)
    schema = pa.schema([("path", pa.string()), ("size", pa.int64()), ("modified", pa.string())])
    for batch in batches:
        for item in batch.to_pylist():
            folder = storage.join(root, item["folder"]) if item["folder"] else root
            if is_local:
                files = _local_files(folder, below=item["below"], above=_above(root, item["folder"]))
            else:
                files = _remote_files(folder, below=item["below"])
            rows = ((_as_text(name[start:]), size, modified) for name, size, modified in files)
            shown = (row for row in rows if not any(part.startswith(".") for part in row[0].split("/")))
            for some in _batched(shown, _BATCH_ROWS):
                columns = zip(*some, strict=True)
                arrays = [pa.array(values, field.type) for values, field in zip(columns, schema, strict=True)]
                yield pa.RecordBatch.from_arrays(arrays, schema=schema)


def _local_files(folder: str, *, below: bool, above: frozenset[str] = frozenset()) -> Iterator[tuple[str, int, str]]:
    """Path, size and time of each file. Links are followed (not in circles); one that leads nowhere is a file of 0
    bytes that cannot be read."""
    above |= {os.path.realpath(folder)}
    with os.scandir(folder) as entries:
        for entry in entries:
            if os.path.isdir(entry.path):  # noqa: PTH112
                if below and os.path.realpath(entry.path) not in above:
                    yield from _local_files(entry.path, below=True, above=above)
                continue
            try:
                status = entry.stat()
            except OSError:
                yield entry.path, 0, ""
                continue
            if stat.S_ISREG(status.st_mode):  # reading a pipe would never end
                yield entry.path, status.st_size, str(status.st_mtime_ns)


def _remote_files(folder: str, *, below: bool) -> Iterator[tuple[str, int, str]]:
    for page in pages(folder, below=below):
        for entry in page:
            if entry["type"] == "file":
                yield entry["name"], entry["size"], str(_modified(entry))


def _modified(entry: dict[str, Any]) -> Any:
    """When a file changed, or what else its storage says that changes with it."""
    return next((entry[key] for key in ("mtime", "LastModified", "ETag", "etag", "updated") if key in entry), "")


def _as_text(name: str) -> str:
    """A name that is not UTF-8 becomes one that no file has: it is set aside as unreadable, not fatal."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
