"""A table of Spark's catalog, or the path of a Parquet or Delta table, with a column of images and one of labels.

Without an id column an image's id is a hash of label and content, so rows that are the same throughout share an id.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.cluster.errors import first_line, spark_failures
from pipeline.config.dataset import SourceSettings
from pipeline.data import reasons
from pipeline.ingest.sources.source import (
    NO_DELTA,
    Form,
    Source,
    SourceError,
    class_number,
    column,
    distinct_classes,
    fingerprint,
    is_without_delta,
    label_name,
    name_or_pattern,
    rows_by_split,
    spark_path,
    split_column,
)

if TYPE_CHECKING:
    import pyarrow as pa
    from pyspark.sql import Column, DataFrame, SparkSession

SPARK_IMAGE = ("height", "width", "mode", "data")


def open_table(
    spark: SparkSession, settings: SourceSettings, *, known_classes: tuple[str, ...] | None, labelled: bool = True
) -> Source:
    """Find the table and check its columns; its images are not read.

    Raises
    ------
    SourceError
        The table or a column is missing, a column has a type that cannot be used, or ids are not unique.
    """
    from pyspark.sql import functions as F

    table = _table(spark, settings)
    form = _check_columns(table, settings, labelled=labelled)
    image = column(settings.image_column)
    label = column(settings.label_column) if labelled else F.lit(None).cast("string")
    name, content = label_name(label), _content(image, form)
    too_large = F.coalesce(F.octet_length(content[-1]) > settings.max_image_bytes, F.lit(False))
    row_id = column(settings.id_column).cast("long") if settings.id_column else F.xxhash64(name, *content)
    has_splits = settings.split_column is not None
    split = split_column(column(settings.split_column)) if settings.split_column else F.lit(None).cast("string")
    files, times = _files(table)
    # Where files say when images changed, their names and sizes stand for the images, which are not read twice.
    totals = _totals(table, settings, [name] if files else [name, *content])
    classes: tuple[str, ...] = ()
    if labelled:
        classes = settings.classes or known_classes or distinct_classes(table, name)
    if labelled and not classes:
        raise SourceError(f"{settings.path}: column {settings.label_column!r} is null or blank in every row")
    items = table.select(
        row_id.alias("id"),
        split.alias("split"),
        (_label_number(table, settings, label, classes) if labelled else F.lit(None).cast("int")).alias("label"),
        F.when(~too_large, image).alias("payload"),  # what is too large is not handed to Python
        too_large.alias("too_large"),
        F.concat(F.lit(f"{settings.path}#"), row_id.cast("string")).alias("origin"),
    )
    description = (totals, table.schema.simpleString(), files)
    return Source(
        classes=classes,
        rows=_rows(table, settings, split, totals[0]),
        form=form,
        pixel_shape=None,
        fingerprint=fingerprint(repr(description)),
        state=fingerprint(repr((*description, times))),
        numbered=False,
        items=items,
        read=functools.partial(_pass_on, has_splits=has_splits),
    )


def _content(image: Column, form: Form) -> list[Column]:
    """What makes two images the same: not where Spark's image source found them. The last one are their bytes."""
    return [image.getField(name) for name in SPARK_IMAGE] if form == "spark_image" else [image]


def _files(table: DataFrame) -> tuple[list[tuple[str, int]], list[str]]:
    """Names and sizes of the table's files, and when they were written; nothing for a table that has none."""
    if not table.inputFiles():
        return [], []
    try:
        columns = [f"_metadata.{name}" for name in ("file_path", "file_size", "file_modification_time")]
        rows = table.select(*columns).distinct().collect()
    except spark_failures():
        return [], []  # a view that joins or aggregates files
    files = sorted((row[0].rsplit("/", 1)[-1], row[1]) for row in rows)
    return files, sorted(f"{row[0].rsplit('/', 1)[-1]} {row[2].timestamp()}" for row in rows)


def _table(spark: SparkSession, settings: SourceSettings) -> DataFrame:
    path = settings.path or ""
    try:
        if settings.kind == "table":
            table = spark.table(path)
        else:
            where = name_or_pattern(spark, path) if settings.kind == "parquet" else spark_path(spark, path)
            table = spark.read.format(settings.kind).load(where)
        table.schema  # noqa: B018 - over Connect only this asks the server
    except spark_failures() as error:
        reason = first_line(error)
        if settings.kind == "delta" and is_without_delta(error):
            raise SourceError(f"{path}: {NO_DELTA}") from None
        raise SourceError(f"{settings.kind} {path} cannot be opened: {reason}") from None
    return table


def _check_columns(table: DataFrame, settings: SourceSettings, *, labelled: bool) -> Form:
    """The form of the images, once every column is there and of a usable type."""
    types = {field.name: field.dataType for field in table.schema.fields}
    wanted = {"image_column": settings.image_column, "label_column": settings.label_column if labelled else None,
              "id_column": settings.id_column, "split_column": settings.split_column}  # fmt: skip
    for setting, name in wanted.items():
        if name is not None and name not in types:
            raise SourceError(
                f"{settings.path} has no column {name!r} (dataset.source.{setting}); it has {', '.join(types)}"
            )
    for setting, name, right in (
        ("label_column", wanted["label_column"], ("string", "tinyint", "smallint", "int", "bigint")),
        ("id_column", settings.id_column, ("tinyint", "smallint", "int", "bigint")),
        ("split_column", settings.split_column, ("string",)),
    ):
        if name is not None and types[name].simpleString() not in right:
            raise SourceError(
                f"{settings.path}: column {name!r} (dataset.source.{setting}) is {types[name].simpleString()}, "
                f"not one of {', '.join(right)}"
            )
    image = types[settings.image_column]
    if image.simpleString() == "binary":
        return "file"
    if image.typeName() == "struct" and set(SPARK_IMAGE) <= set(image.fieldNames()):  # type: ignore[attr-defined]
        return "spark_image"
    raise SourceError(
        f"{settings.path}: column {settings.image_column!r} (dataset.source.image_column) is {image.simpleString()}, "
        "neither binary nor the struct of Spark's image source (origin, height, width, nChannels, mode, data)"
    )


def _totals(table: DataFrame, settings: SourceSettings, columns: list[Column]) -> tuple[Any, ...]:
    """Rows, and what stands for the columns, ids and splits in the fingerprint."""
    from pyspark.sql import functions as F

    more = [column(name) for name in (settings.id_column, settings.split_column) if name]
    value = F.xxhash64(*columns, *more)
    wanted = [F.count("*"), F.sum(value.cast("decimal(38,0)")), F.bit_xor(value)]
    if settings.id_column:
        wanted.append(F.countDistinct(column(settings.id_column)))
    row = table.agg(*wanted).first()
    assert row is not None
    if not row[0]:
        raise SourceError(f"{settings.path} has no rows: fill it, or set dataset.source.path to another table")
    if settings.id_column and row[3] != row[0]:
        raise SourceError(
            f"{settings.path}: column {settings.id_column!r} (dataset.source.id_column) has {row[3]} distinct values "
            f"in {row[0]} rows; it must be unique and never null"
        )
    return tuple(str(value) if number else value for number, value in enumerate(row))


def _label_number(table: DataFrame, settings: SourceSettings, label: Column, classes: tuple[str, ...]) -> Column:
    """The place of each label among the classes. A whole number beside given names is such a place itself, unless the
    names are whole numbers, too: then it is one of them."""
    from pyspark.sql import functions as F

    if table.schema[settings.label_column].dataType.simpleString() == "string" or not settings.classes:
        return class_number(label_name(label), classes)
    if not all(re.fullmatch(r"-?\d+", name) for name in classes):
        return F.when((label >= 0) & (label < len(classes)), label.cast("int")).when(label.isNotNull(), F.lit(-1))
    numbers = tuple(str(int(name)) for name in classes)
    if len(set(numbers)) < len(numbers):
        raise SourceError(
            f"dataset.source.classes {', '.join(classes)} has one number twice, and column "
            f"{settings.label_column!r} of {settings.path} has numbers: write each once"
        )
    return class_number(label.cast("string"), numbers)


def _rows(table: DataFrame, settings: SourceSettings, split: Column, rows: int) -> dict[str, int]:
    if not settings.split_column:
        return {"": rows}
    counts = rows_by_split(table.select(split.alias("split")))
    if not counts.get("train"):
        raise SourceError(f"{settings.path}: column {settings.split_column!r} says `train` in no row")
    return counts


def _pass_on(items: pa.RecordBatch, *, has_splits: bool) -> Iterator[pa.RecordBatch]:
    """On an executor: the table's rows are the images."""
    import pyarrow as pa
    import pyarrow.compute as pc

    none = pa.nulls(items.num_rows, pa.string())
    problem = pc.if_else(items.column("too_large"), pa.scalar(reasons.TOO_MANY_BYTES), none)
    if has_splits:
        problem = pc.if_else(items.column("split").is_null(), pa.scalar(reasons.MISSING_SPLIT), problem)
    columns = [items.column(name) for name in ("id", "split", "label", "payload", "origin")]
    yield pa.RecordBatch.from_arrays(
        [*columns, problem], names=["id", "split", "label", "payload", "origin", "problem"]
    )
