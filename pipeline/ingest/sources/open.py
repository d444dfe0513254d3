"""From the settings of a source to the source: the one place that knows every kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.dataset import SourceSettings
from pipeline.data.manifest import Manifest
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
    base: Manifest | None = None,
) -> Source:
    """Find the source and check what can be checked without reading its images.

    Parameters
    ----------
    cache : folder for what has to be fetched
    base : the version of a dataset that is added to: numbered images go on from its last id, and labels that the
        settings do not name are looked up in its classes

    Raises
    ------
    SourceError
        A file, folder or table is missing, cut or altered, or contradicts another; it is named.
    """
    known_classes = base.classes if base else None
    if settings.kind == "folder":
        return open_folder(spark, settings, known_classes=known_classes)
    if settings.kind in ("table", "parquet", "delta"):
        return open_table(spark, settings, known_classes=known_classes)
    return open_record_files(
        spark, settings, cache, first_id=sum(source.rows for source in base.sources) if base else 0
    )
