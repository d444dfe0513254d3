"""Petastorm 0.12's ``make_batch_reader`` on today's pyarrow and numpy. No Spark import of its own.

Petastorm imports ``pyarrow.filesystem``, asks for the legacy ``ParquetDataset`` and for ``np.string_``; all three are
gone (uber/petastorm#806). It gets them here in its own modules' names: a `_Dataset` of `_Piece` over
``pyarrow.parquet.ParquetFile`` and fsspec, and a numpy with the two old names. pyarrow, numpy and ``sys.modules`` are
left as they were, so other code sees nothing of it.

Petastorm keeps pickles in ``_common_metadata``. They are never read: a dataset must not be able to run code. Files
whose name starts with ``_`` or ``.`` are not opened, the schema comes from the Parquet footer alone, and Petastorm's
own unpickling is replaced by an error. (What Petastorm pickles for itself stays: ``cache_type="local-disk"`` keeps
pickles in ``cache_location``, which must be a folder that only its user can write.)
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any, BinaryIO

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.storage.address import check_written

_LOCK = threading.Lock()
_NAMESPACES_GIVEN = "sparknorm_compat"  # an attribute of the petastorm package: a reloaded one is made ready anew
_WORKER = (
    "import runpy; from pipeline.data.petastorm_compat import load; load(); "
    "runpy.run_module('petastorm.workers_pool.exec_in_new_process_entrypoint', run_name='__main__')"
)


def make_batch_reader(
    urls: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    row_groups: Sequence[tuple[int, int]] | None = None,
    check: Callable[[int, BinaryIO], None] | None = None,
    **petastorm_kwargs: Any,
) -> Any:
    """Petastorm's own ``Reader`` of plain Parquet files, one numpy batch for each row group.

    Parameters
    ----------
    urls : files, or one folder, on one filesystem: paths or any URL that fsspec opens. A list is read in its order,
        a folder in the order of its sorted paths. The process pool cannot see ``memory://`` of this process.
    row_groups : what Petastorm has no argument for: (index in ``urls``, row group of that file) pairs to read, in
        this order, without reading every footer first. Default: all, in order. ``cur_shard`` of ``shard_count``
        gets every ``shard_count``-th of them.
    check : called with a file's index in ``urls`` and the open file each time before anything of it is parsed; what it
        raises comes from the reader
    petastorm_kwargs : as for ``petastorm.make_batch_reader``. ``filesystem`` is an fsspec filesystem;
        ``hdfs_driver`` has no effect. ``reader_pool_type`` may be thread, process or dummy. ``predicate`` is an
        ``in_lambda`` of whole columns: Petastorm's other predicates are for single rows, here as in its own reader.

    Raises
    ------
    ImportError
        Petastorm 0.12 is not installed.
    ValueError
        No URL, one with ``::``, URLs of several filesystems, a Hive-partitioned folder, or an argument that needs what
        is not supported: ``filters`` (of partitions) and ``rowgroup_selector`` (a pickled index).
    FileNotFoundError
        The folder holds no Parquet file, or the first file is missing.
    """
    petastorm = load()
    for name, instead in (("filters", "predicate"), ("rowgroup_selector", "predicate or row_groups")):
        if petastorm_kwargs.get(name) is not None:
            raise ValueError(f"make_batch_reader: {name} is not supported here, use {instead}")
    files = _resolve(
        urls,
        storage_options=petastorm_kwargs.get("storage_options"),
        filesystem=petastorm_kwargs.get("filesystem"),
        row_groups=row_groups,
    )
    files.check = check
    return petastorm.reader.make_batch_reader(files, **petastorm_kwargs)


def load() -> Any:
    """The ``petastorm`` package, made to run on the installed pyarrow and numpy; imported on the first call.

    Raises
    ------
    ImportError
        Petastorm is missing or not of version 0.12.
    """
    with _LOCK:
        _check_version()
        if hasattr(sys.modules.get("petastorm"), _NAMESPACES_GIVEN):
            return sys.modules["petastorm"]
        with _stand_ins():
            petastorm = importlib.import_module("petastorm")
            modules = {name: importlib.import_module(f"petastorm.{name}") for name in _MODULES}
        _give_namespaces(modules)
        setattr(petastorm, _NAMESPACES_GIVEN, True)
        return petastorm


def _check_version() -> None:
    try:
        version = importlib.metadata.version("petastorm")
    except importlib.metadata.PackageNotFoundError:
        version = "none"
    if not version.startswith("0.12."):
        raise ImportError(
            f"needs Petastorm 0.12, found {version}: pip install 'sparknorm[petastorm]'", name="petastorm"
        )


@contextmanager
def _stand_ins() -> Iterator[None]:
    """What petastorm imports and nobody has any more, importable inside this block only."""
    modules: dict[str, dict[str, object]] = {
        "pyarrow.filesystem": {"LocalFileSystem": type("LocalFileSystem", (), {})},
        # It needs pyarrow.hdfs and distutils; HDFS is opened through fsspec here.
        "petastorm.hdfs.namenode": {"HdfsNamenodeResolver": None, "HdfsConnector": None},
    }
    added = [name for name in modules if name not in sys.modules]
    try:
        for name in added:
            module = ModuleType(name)
            vars(module).update(modules[name])
            sys.modules[name] = module
        yield
    finally:
        for name in added:
            sys.modules.pop(name, None)


class _Numpy1(ModuleType):
    """numpy with the two names that numpy 2 took away and petastorm uses."""

    string_, unicode_ = np.bytes_, np.str_

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


_MODULES = (
    "reader",
    "unischema",
    "arrow_reader_worker",
    "etl.dataset_metadata",
    "etl.rowgroup_indexing",
    "workers_pool.exec_in_new_process",
)


def _give_namespaces(modules: dict[str, ModuleType]) -> None:
    """Replace names in petastorm's modules, and nowhere else."""
    parquet, numpy = SimpleNamespace(ParquetDataset=_Dataset), _Numpy1("numpy")

    def no_schema(*_: Any, **__: Any) -> None:
        # Petastorm then takes the schema from the Parquet footer.
        raise modules["etl.dataset_metadata"].PetastormMetadataError("pickled schemas are not read")

    for module, name, value in (
        ("reader", "pq", parquet),
        ("reader", "normalize_dataset_url_or_urls", lambda urls: urls),
        ("reader", "get_filesystem_and_path_or_paths", _resolve_for_petastorm),
        ("unischema", "np", numpy),
        ("arrow_reader_worker", "np", numpy),
        ("arrow_reader_worker", "pq", parquet),
        ("arrow_reader_worker", "ParquetFile", _close),
        ("etl.dataset_metadata", "load_row_groups", lambda dataset: dataset.row_groups()),
        ("etl.dataset_metadata", "get_schema", no_schema),
        ("etl.dataset_metadata", "get_schema_from_dataset_url", no_schema),
        ("etl.dataset_metadata", "depickle_legacy_package_name_compatible", _refuse_pickle),
        ("etl.rowgroup_indexing", "depickle_legacy_package_name_compatible", _refuse_pickle),
        ("workers_pool.exec_in_new_process", "subprocess", SimpleNamespace(Popen=_start_worker)),
    ):
        if not hasattr(modules[module], name):
            raise ImportError(f"petastorm.{module} has no {name}: needs Petastorm 0.12.1", name="petastorm")
        setattr(modules[module], name, value)


def _refuse_pickle(_: bytes) -> Any:
    raise ValueError("Petastorm's pickled metadata is not read: a dataset must not be able to run code")


def _close(file: Any) -> None:
    # A worker opens every row group's file for a ParquetFile that it then does not use: the piece reads.
    file.close()


def _start_worker(args: Sequence[str], executable: str) -> subprocess.Popen:
    """A process of the process pool. A fresh interpreter cannot import petastorm either: `load` comes first there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.Popen([executable, "-c", _WORKER, args[-1]], env=environment)


class _Files(list[str]):
    """Paths of one filesystem, and which of their row groups to read (None: all). Petastorm passes it on whole."""

    filesystem: Any
    row_groups: list[tuple[int, int]] | None
    check: Callable[[int, BinaryIO], None] | None = None


def _resolve(
    urls: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    storage_options: dict[str, Any] | None,
    filesystem: Any,
    row_groups: Sequence[tuple[int, int]] | None,
) -> _Files:
    listed = [urls] if isinstance(urls, (str, os.PathLike)) else list(urls)
    names = [os.fspath(url) for url in listed]
    if not names:
        raise ValueError("make_batch_reader needs at least one URL")
    if filesystem is None:
        for name in names:
            check_written(name)
        opened = [fsspec.core.url_to_fs(name, **(storage_options or {})) for name in names]
        filesystem = opened[0][0]
        others = [name for name, (other, _) in zip(names, opened, strict=True) if other != filesystem]
        if others:
            raise ValueError(f"all URLs must be of one filesystem: {others[0]} is not of that of {names[0]}")
        paths = [path for _, path in opened]
    else:
        paths = [filesystem._strip_protocol(name) for name in names]
    if isinstance(urls, (str, os.PathLike)) and filesystem.isdir(paths[0]):
        paths = _parquet_files(filesystem, paths[0])
    files = _Files(paths)
    files.filesystem, files.row_groups = filesystem, None if row_groups is None else list(row_groups)
    return files


def _resolve_for_petastorm(
    urls: Any, hdfs_driver: str = "", storage_options: dict[str, Any] | None = None, filesystem: Any = None
) -> tuple[Any, _Files]:
    if not isinstance(urls, _Files):
        urls = _resolve(urls, storage_options=storage_options, filesystem=filesystem, row_groups=None)
    return urls.filesystem, urls


def _parquet_files(filesystem: Any, folder: str) -> list[str]:
    """Sorted files of a folder, without what Spark and Petastorm hide behind a leading ``_`` or ``.``."""
    filesystem.invalidate_cache(folder)
    files = []
    for path in sorted(filesystem.find(folder)):
        parts = path[len(folder.rstrip("/")) :].strip("/").split("/")
        if any(part[:1] in ("_", ".") for part in parts):
            continue
        if any("=" in part for part in parts[:-1]):
            raise ValueError(f"{folder} is partitioned ({'/'.join(parts[:-1])}): give a list of files instead")
        files.append(path)
    if not files:
        raise FileNotFoundError(f"{folder}: no Parquet files in this folder")
    return files


@dataclass(frozen=True)
class _Piece:
    """One file, or one row group of it: the part of the legacy ``ParquetDatasetPiece`` that petastorm uses."""

    filesystem: Any
    path: str
    row_group: int | None = None
    check: Callable[[BinaryIO], None] | None = None

    def get_metadata(self) -> pq.FileMetaData:
        with self._open() as file:
            return file.metadata

    def read(self, columns: Sequence[str], partitions: None) -> pa.Table:
        """The row group's ``columns``, in the order of the file."""
        with self._open() as file:
            table = file.read_row_group(self.row_group, columns=sorted(columns))
            if missing := sorted(set(columns) - set(table.column_names)):
                raise pa.ArrowInvalid(f"has no column {', '.join(missing)}")
            return table

    @contextmanager
    def _open(self) -> Iterator[pq.ParquetFile]:
        """Arrow's errors do not say which file they are about."""
        try:
            with self.filesystem.open(self.path, "rb") as file:
                if self.check is not None:
                    self.check(file)
                yield pq.ParquetFile(file, pre_buffer=False, page_checksum_verification=True)
        except pa.ArrowException as error:
            raise OSError(f"{self.path}, row group {self.row_group}: {error}") from error


class _Dataset:
    """The part of the legacy ``ParquetDataset`` that petastorm uses. It has no partitions and no metadata files."""

    partitions = metadata = common_metadata = None

    def __init__(self, files: _Files, **_: Any):
        self.fs = files.filesystem
        check = files.check
        self.pieces = [
            _Piece(files.filesystem, path, check=functools.partial(check, number) if check else None)
            for number, path in enumerate(files)
        ]
        self._row_groups = files.row_groups

    def row_groups(self) -> list[_Piece]:
        """One piece for each row group: the asked-for ones, or all that the footers tell of."""
        chosen = self._row_groups
        if chosen is None:
            with ThreadPoolExecutor(max_workers=10) as pool:
                footers = list(pool.map(_Piece.get_metadata, self.pieces))
            chosen = [(file, group) for file, footer in enumerate(footers) for group in range(footer.num_row_groups)]
        return [replace(self.pieces[file], row_group=group) for file, group in chosen]
