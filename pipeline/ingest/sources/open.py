"""From the settings of a source to the source: the one place that knows every kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.dataset import SourceSettings
from pipeline.ingest.sources.folder import open_folder
from pipeline.ingest.sources.records import open_record_files
from pipeline.ingest.sources.source import Source
from pipeline.ingest.sources.table import open_table

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


def open_source(
    spark: SparkSession,
    settings: SourceSettings,
    cache: str,
    *,
    first_id: int = 0,
    known_classes: tuple[str, ...] | None = None,
) -> Source:
    """Find the source and check what can be checked without reading its images.

    Parameters
    ----------
    cache : folder for what has to be fetched
    first_id : id of the first image of a source whose images are numbered
    known_classes : those of a dataset that is added to; labels that the settings do not name are looked up in them

    Raises
    ------
    SourceError
        A file, folder or table is missing, cut or altered, or contradicts another; it is named.
    """
    if settings.kind == "folder":
        return open_folder(spark, settings, known_classes=known_classes)
    if settings.kind in ("table", "parquet", "delta"):
        return open_table(spark, settings, known_classes=known_classes)
    return open_record_files(spark, settings, cache, first_id=first_id)
