"""Whether all executors have the same versions of what decides the bytes of a shard.

Two versions of pyarrow write the same rows as different bytes, and two versions of Pillow may decode a JPEG to
different pixels: a dataset would hang on which executor got which task.
"""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

import pipeline
from pipeline.cluster.resources import is_local

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def check_versions(spark: SparkSession) -> None:
    """Ask the executors that are there, with one short task for each core, and raise where their versions differ.

    Raises
    ------
    ValueError
        The message names each version and its hosts.
    """
    if is_local(spark):
        return
    found = spark.range(1 << 12).mapInArrow(_versions, "host string, package string, version string")
    rows = [(row.host, row.package, row.version) for row in found.distinct().collect()]
    for package in sorted({package for _, package, _ in rows}):
        if text := differing((host, version) for host, name, version in rows if name == package):
            raise ValueError(
                f"executors have several versions of {package}, on which the bytes of a dataset hang: {text}. "
                "Install one version on all of them"
            )


def differing(versions: Iterable[tuple[str, str]]) -> str:
    """Each version with its hosts, in words; empty where all are the same.

    Parameters
    ----------
    versions : (host, version) of each that was asked
    """
    hosts = defaultdict(set)
    for host, version in versions:
        hosts[version].add(host)
    if len(hosts) < 2:
        return ""
    return " and ".join(f"{version} on {', '.join(sorted(names))}" for version, names in sorted(hosts.items()))


def _versions(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for _ in batches:  # Spark waits until a task has taken what it is given
        pass
    versions = {"Pillow": _pillow(), "pyarrow": pa.__version__, "sparknorm": pipeline.__version__}
    yield pa.RecordBatch.from_pydict(
        {"host": [socket.gethostname()] * len(versions), "package": list(versions), "version": list(versions.values())}
    )


def _pillow() -> str:
    try:
        import PIL
    except ImportError:  # only encoded images need it
        return "none"
    return PIL.__version__
