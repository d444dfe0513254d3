"""Which files of a folder are taken for images by their names, and what else is there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pipeline.config.dataset import ANY_EXTENSION, SourceSettings
from pipeline.config.frozen import FrozenModel
from pipeline.data import reasons

if TYPE_CHECKING:
    from pyspark.sql import Column, DataFrame

# How many kinds of other files, and how many of the files themselves, a result names.
_MOST_EXTENSIONS, _MOST_EXAMPLES = 20, 5


class OtherFiles(FrozenModel):
    """What lies in a folder of images and was passed over, since its name is not that of an image.

    files : how many there are; hidden ones, whose path has a part that begins with a dot, are not counted
    extensions : files by what their names end in, the 20 most frequent; "" are those without an extension
    examples : paths below the folder, one of each of the five most frequent kinds
    """

    files: int
    extensions: dict[str, int]
    examples: tuple[str, ...]

    def __str__(self) -> str:
        kinds = ", ".join(f"{count:,} {name or 'without an extension'}" for name, count in self.extensions.items())
        return f"{kinds}, such as {self.examples[0]}" if self.files else "none"


NO_OTHER_FILES = OtherFiles(files=0, extensions={}, examples=())


def image_files(files: DataFrame, settings: SourceSettings) -> DataFrame:
    """Say of each file whether it is an item of the source (``is_item``), and why it is not to be read (``problem``).

    Parameters
    ----------
    files : paths with ``size`` in bytes (null where there is a label and no file), ``modified``, and ``listed``,
        whether a file of labels has the path: then it is an item whatever its name
    """
    from pyspark.sql import functions as F

    size = F.col("size")
    is_image = F.lit(ANY_EXTENSION in settings.extensions) | _extension(F.col("path")).isin(*settings.extensions)
    problem = (
        F.when(size.isNull(), reasons.MISSING_IMAGE)
        .when(~is_image, reasons.OTHER_EXTENSION)
        .when(size > settings.max_image_bytes, reasons.TOO_MANY_BYTES)
    )
    return (
        files.withColumn("problem", problem)
        .withColumn("is_item", is_image | F.coalesce("listed", F.lit(False)))
        # What is not read is no part of the fingerprint.
        .withColumn("size", F.when(is_image, size))
        .withColumn("modified", F.when(is_image, F.col("modified")))
    )


def other_files(files: DataFrame) -> OtherFiles:
    """Count files, a row each with the column ``path``, by what their names end in."""
    from pyspark.sql import functions as F

    kinds = files.groupBy(_extension(F.col("path")).alias("extension")).agg(
        F.count("*").alias("files"), F.min("path").alias("example")
    )
    rows = kinds.orderBy(F.desc("files"), "extension").limit(_MOST_EXTENSIONS).collect()
    return OtherFiles(
        files=files.count() if len(rows) == _MOST_EXTENSIONS else sum(row["files"] for row in rows),
        extensions={row["extension"]: row["files"] for row in rows},
        examples=tuple(row["example"] for row in rows[:_MOST_EXAMPLES]),
    )


def _extension(path: Column) -> Column:
    """What a name ends in from its last dot on, in small letters; "" where it has no dot."""
    from pyspark.sql import functions as F

    return F.lower(F.regexp_extract(path, r"\.[^./]*$", 0))
