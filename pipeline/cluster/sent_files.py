"""Files that the driver gives to all executors through Spark, which need no credentials and no shared disk for them."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.cluster.connect import is_connect

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# What each session has sent already, by name: Spark takes a name once, and from one place.
_sent: weakref.WeakKeyDictionary[SparkSession, set[str]] = weakref.WeakKeyDictionary()


def send(spark: SparkSession, name: str, content: bytes) -> None:
    """Let executors have a file, which they find at ``SparkFiles.get(name)``.

    Parameters
    ----------
    name : that no other content has in this session: one with a hash of it
    """
    sent = _sent.setdefault(spark, set())
    if name in sent:
        return
    # Executors that come later fetch it from here: it stays until this process ends.
    path = Path(tempfile.mkdtemp(prefix="sparknorm-sent-"), name)
    path.write_bytes(content)
    weakref.finalize(spark, _remove, path)
    if is_connect(spark):
        spark.addArtifacts(str(path), file=True)
    else:
        spark.sparkContext.addFile(str(path))
    sent.add(name)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.parent.rmdir()
