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
    labelled: bool = True,
    first_id: int | None = None,
) -> Source:
    """Find the source and check what can be checked without reading its images.

    Parameters
    ----------
    cache : folder for what has to be fetched
    base : the version of a dataset that is added to: numbered images go on from its last id, and labels that the
        settings do not name are looked up in its classes
    first_id : of numbered images, where ``base`` does not say it
    labelled : whether every image should have a label; without it none has one, and a table needs no column of them

    Raises
    ------
    SourceError
        A file, folder or table is missing, cut or altered, or contradicts another; it is named.
    """
    known_classes = base.classes if base else None
    if settings.kind == "folder":
        return open_folder(spark, settings, known_classes=known_classes, labelled=labelled)
    if settings.kind in ("table", "parquet", "delta"):
        return open_table(spark, settings, known_classes=known_classes, labelled=labelled)
    if first_id is None:
        first_id = sum(source.rows for source in base.sources) if base else 0
    return open_record_files(spark, settings, cache, first_id=first_id)
