"""The scores as a table of Spark's catalog: one partition for each version, written again as a whole where it must."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pipeline import storage
from pipeline.cluster.errors import first_line, spark_failures
from pipeline.ingest.sources.source import NO_DELTA, is_without_delta, spark_path
from pipeline.serving.scoring.errors import ScoreError
from pipeline.serving.scoring.scores import Scores

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

# The property of the table that says which folder it has the scores of.
_OWNER = "sparknorm.scores"
COLUMNS = ("id", "class", "probabilities", "origin", "model", "score_version")
_DYNAMIC = "spark.sql.sources.partitionOverwriteMode"


class ScoreTable:
    """A table that has the rows of all parts which the scores of one folder list.

    A version's rows are written with one statement that replaces those that a job which died may have left of it, so
    that none is there twice. Those of a first version replace all: what the table has then is of scores that somebody
    has deleted to score again.

    Parameters
    ----------
    name : in Spark's catalog, perhaps with that of a schema and a catalog
    kind : "parquet" or "delta", of a table that is made anew
    """

    def __init__(self, spark: SparkSession, name: str, kind: str):
        self._spark, self.name, self._kind = spark, name, kind

    def check(self, folder: str) -> None:
        """Raise ScoreError where the table has something else than the scores of a folder, or cannot be made."""
        try:
            if not self.is_there():
                self._check_kind(folder)
                return
            rows = self._spark.sql(f"SHOW TBLPROPERTIES {self.name}").collect()
            columns = self._spark.table(self.name).columns
        except spark_failures() as error:
            raise ScoreError(f"score.table {self.name} cannot be looked up: {first_line(error)}") from None
        owner = {row[0]: row[1] for row in rows}.get(_OWNER)
        if owner != folder or set(columns) != set(COLUMNS):
            whose = f"has the scores of {owner}" if owner else "was not made by `score`"
            raise ScoreError(f"score.table {self.name} is there, and {whose}: choose another, or drop it")

    def is_there(self) -> bool:
        """Whether there is such a table already."""
        return bool(self._spark.catalog.tableExists(self.name))

    def _check_kind(self, folder: str) -> None:
        """Raise ScoreError where Spark cannot make such a table, before anything is scored."""
        if self._kind != "delta":
            return
        try:
            self._spark.read.format("delta").load(spark_path(self._spark, folder)).schema  # noqa: B018 - asks the server over Connect
        except spark_failures() as error:  # with Delta Lake: the folder is no table
            if is_without_delta(error):
                raise ScoreError(f"score.table_format delta: {NO_DELTA}; or choose parquet") from None

    def write(self, folder: str, scores: Scores, paths: Sequence[str]) -> None:
        """Write the rows of the parts of the newest version."""
        if not paths:
            return
        rows = self._rows(folder, paths)
        if not self.is_there():
            empty = rows.limit(0)
            empty.writeTo(self.name).using(self._kind).partitionedBy("score_version").tableProperty(
                _OWNER, folder
            ).create()
        before = self._spark.conf.get(_DYNAMIC, None) or "static"
        self._spark.conf.set(_DYNAMIC, "static" if scores.version == 1 else "dynamic")
        try:
            columns = self._spark.table(self.name).columns
            rows.select(*columns).write.insertInto(self.name, overwrite=True)
        finally:
            self._spark.conf.set(_DYNAMIC, before)

    def _rows(self, folder: str, paths: Sequence[str]) -> DataFrame:
        return self._spark.read.parquet(*(spark_path(self._spark, storage.join(folder, path)) for path in paths))
