"""Settings of `score`: which model looks at which images, and where the probabilities go."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.dataset import IMAGE_EXTENSIONS, TABLES, SourceSettings
from pipeline.config.frozen import FrozenModel

DATASET: Literal["dataset"] = "dataset"


class ScoreSourceSettings(FrozenModel):
    """The images to score come from one source, and need no labels."""

    kind: Literal[
        "dataset", "fashion_mnist", "idx", "cifar10", "cifar100", "folder", "table", "parquet", "delta"
    ] = Field(
        DATASET,
        description="dataset: the shards of a dataset of sparknorm; the others as for dataset.source.kind, but no "
        "image needs a label",
    )  # fmt: skip
    path: str | None = Field(None, description="as for dataset.source.path; dataset: null is dataset.path")
    split: Literal["train", "validation", "test"] | None = Field(
        None, description="dataset: the split to score; null: all of them"
    )
    image_column: str = Field("image", description="column of the table: bytes, or the struct of Spark's image source")
    id_column: str | None = Field(None, description="integer column of the table that is unique; null: a content hash")
    extensions: tuple[str, ...] = Field(
        IMAGE_EXTENSIONS, min_length=1, description="folder: what the names of images end in, as dataset.source has it"
    )
    max_image_bytes: int = Field(
        256 << 20, ge=1, le=1 << 30, description="folder, tables: an image of more bytes is set aside unread"
    )

    @model_validator(mode="after")
    def _complete(self) -> ScoreSourceSettings:
        if self.split is not None and self.kind != DATASET:
            raise ValueError(f"split is for kind: {DATASET}, this is kind: {self.kind}")
        if self.kind != DATASET:
            self.as_source(("any",))
        elif self.id_column is not None:
            raise ValueError(f"id_column is for kind: {' or '.join(TABLES)}, this is kind: {self.kind}")
        return self

    def as_source(self, classes: tuple[str, ...]) -> SourceSettings:
        """The same as `ingest` takes it.

        Parameters
        ----------
        classes : of the model, which stand for those that a source of kind idx has to name
        """
        values = self.model_dump(exclude={"split"})
        return SourceSettings(**values, classes=classes if self.kind == "idx" else None)


class ScoreSettings(FrozenModel):
    """A registered model gives every image of a source the probabilities of its classes."""

    model: str | None = Field(
        None,
        description="models:/NAME@ALIAS, models:/NAME/VERSION, runs:/RUN/served of a run that `register` took, or a "
        "folder on the driver's disk with a downloaded version; null: the champion of registry.model",
    )
    source: ScoreSourceSettings = ScoreSourceSettings()
    output: str | None = Field(
        None, description="folder or fsspec URL of the scores, which executors write; null: `scores` in `output`"
    )
    table: str | None = Field(
        None,
        description="table of Spark's catalog that gets the scores too, partitioned by score_version; null: none",
    )
    table_format: Literal["parquet", "delta"] = Field("parquet", description="format of a `table` that is made anew")
    append: bool = Field(False, description="score what is new in the source since the last time, as a new version")
    batch_size: int = Field(256, ge=1, description="images that go through the network at once")
    decode_threads: int | None = Field(
        None,
        ge=1,
        description="threads of each task that read and decode while the network computes; null: one, and eight where "
        "files are on remote storage, for which they wait",
    )
    part_rows: int = Field(
        10_000, ge=1, description="images of one task and of one file, at most about; there are 32 parts or more"
    )
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of set-aside images above which `score` fails")
    reference_images: int = Field(
        4_000,
        ge=0,
        description="images of each split of dataset.path, about, that inputs and predictions are compared with; 0: "
        "nothing is compared",
    )
