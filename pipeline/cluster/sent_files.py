"""Files that the driver gives to all executors through Spark, which need no credentials and no shared disk for them."""

from __future__ import annotations

import tempfile
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.cluster.connect import is_connect
from pipeline.storage import local_file

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# What each SparkContext, or each session of Spark Connect, has sent already, by name: Spark takes a name once.
_sent: weakref.WeakKeyDictionary[Any, set[str]] = weakref.WeakKeyDictionary()


def send(spark: SparkSession, name: str, content: bytes) -> None:
    """Let executors have a file, which they find at ``SparkFiles.get(name)``.

    Parameters
    ----------
    name : that no other content has in this application: one with a hash of it
    """
    sent = _sent.setdefault(spark if is_connect(spark) else spark.sparkContext, set())
    if name in sent:
        return
    if is_connect(spark):
        with tempfile.TemporaryDirectory(prefix="sparknorm-sent-") as folder:
            path = Path(folder, name)
            path.write_bytes(content)
            spark.addArtifacts(str(path), file=True)
    else:
        path = _place(spark) / name
        with local_file.under_passing_name(path, content, durable=False) as temporary:
            temporary.replace(path)
        spark.sparkContext.addFile(str(path))
    sent.add(name)


def _place(spark: SparkSession) -> Path:
    """The folder from which executors fetch files, also those that come later: Spark deletes it with the context.

    It is the same for every process that uses the context, since Spark takes a file of one name from one place only.
    """
    java: Any = spark.sparkContext._jvm
    return Path(java.org.apache.spark.SparkFiles.getRootDirectory(), "sparknorm-sent")
