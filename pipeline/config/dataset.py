"""Settings of the data: where images come from, what becomes of them, how they are read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.config.frozen import FrozenModel

# Sources whose images are stored raw in one shape, so that none has to be set.
FIXED_SHAPE = ("fashion_mnist", "idx", "cifar10", "cifar100")
TABLES = ("table", "parquet", "delta")
# What the names of files end in that are taken for images, unless the settings say otherwise; ANY_EXTENSION takes all.
IMAGE_EXTENSIONS = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
ANY_EXTENSION = "any"


class DeformSettings(FrozenModel):
    """A deformed copy differs from its original by at most this much (see `pipeline/ingest/deform.py`)."""

    shift: float = Field(2.0, ge=0, description="shift by up to this many pixels each way")
    rotation: float = Field(10.0, ge=0, le=180, description="turn by up to this many degrees each way")
    scale: float = Field(
        0.1, ge=0, lt=1, description="factor on the size, from 1 - scale to 1 + scale, for each axis anew"
    )
    elastic: float = Field(1.0, ge=0, description="standard deviation of the smooth displacement, in pixels")


class SourceSettings(FrozenModel):
    """The images come from one source."""

    kind: Literal[
        "fashion_mnist", "idx", "cifar10", "cifar100", "folder", "table", "parquet", "delta"
    ] = Field(
        "fashion_mnist",
        description="fashion_mnist: the published files, found or fetched, checksums verified; idx: four files in the "
        "IDX format of MNIST; cifar10, cifar100: the binary version's files; folder: files of images (`extensions`); "
        "table: a table of Spark's catalog; parquet, delta: the path of such a table",
    )  # fmt: skip
    path: str | None = Field(None, description="folder, or name of the table; executors must see it too")
    classes: tuple[str, ...] | None = Field(
        None,
        description="class names in label order; null: known (fashion_mnist, cifar10) or the labels found, sorted. "
        "Whole numbers in a table's label column are places among the names, from 0, unless all names are whole "
        "numbers: then each is the class of that name",
    )
    labels: str | None = Field(
        None, description="folder: CSV (with a header) or Parquet file of labels; null: an image's folder is its label"
    )
    path_column: str = Field("path", description="column of `labels` with the path of an image below the folder")
    label_column: str = Field("label", description="column of the table, or of `labels`, with the label")
    image_column: str = Field("image", description="column of the table: bytes, or the struct of Spark's image source")
    id_column: str | None = Field(None, description="integer column of the table that is unique; null: a content hash")
    split_column: str | None = Field(None, description="column of the table: train, validation or test")
    extensions: tuple[str, ...] = Field(
        IMAGE_EXTENSIONS,
        min_length=1,
        description='folder: what the names of images end in, in any case; "" takes names without an extension too, '
        "`any` every file. What else lies there is counted in the result",
    )
    max_image_bytes: int = Field(
        256 << 20,
        ge=1,
        le=1 << 30,
        description="folder, tables: a file, or a value of the image column, of more bytes is set aside unread",
    )
    split_folders: bool = Field(False, description="folder: the first folder below it is train, validation or test")
    expand: int = Field(1, ge=1, description="images that each training image becomes: itself and deformed copies")
    deform: DeformSettings = DeformSettings()

    @field_validator("extensions")
    @classmethod
    def _as_names_end(cls, extensions: tuple[str, ...]) -> tuple[str, ...]:
        """With a dot, in small letters, sorted: the same names give the same digest."""
        lower = [name.lower() for name in extensions]
        dotted = {name if name in ("", ANY_EXTENSION) or name[:1] == "." else f".{name}" for name in lower}
        for name in dotted:
            if name.count(".") > 1 or "/" in name or name == ".":
                raise ValueError(
                    f"extensions has {name!r}: write what follows the last dot of a name, for example .tif"
                )
        return tuple(sorted(dotted))

    @model_validator(mode="after")
    def _complete(self) -> SourceSettings:
        if self.kind == "idx" and not (self.path and self.classes):
            raise ValueError("kind: idx needs `path` (the folder of the four files) and `classes` (their names)")
        if self.kind != "fashion_mnist" and not self.path:
            raise ValueError(f"kind: {self.kind} needs `path`")
        if self.classes is not None and len(set(self.classes)) != len(self.classes):
            raise ValueError(f"classes lists a name twice: {list(self.classes)}")
        for name, kinds in (("labels", ("folder",)), ("split_folders", ("folder",)), ("split_column", TABLES),
                            ("id_column", TABLES), ("extensions", ("folder",))):  # fmt: skip
            if getattr(self, name) != type(self).model_fields[name].default and self.kind not in kinds:
                raise ValueError(f"{name} is for kind: {' or '.join(kinds)}, this is kind: {self.kind}")
        return self


class ImageSettings(FrozenModel):
    """Every image is made to have one shape and encoding before it is stored."""

    shape: tuple[int, int, int] | None = Field(
        None, description="channels (1 or 3), height, width; null: the one shape of the source (not for files, tables)"
    )
    resize: Literal["none", "crop", "letterbox"] = Field(
        "crop",
        description="crop: the shorter side fits, the centre stays; letterbox: the longer side fits, the rest is "
        "background; none: an image of another size is set aside",
    )
    background: int = Field(
        255,
        ge=0,
        le=255,
        description="grey, 0 black to 255 white, that fills a letterbox and shows through transparency",
    )
    max_pixels: int = Field(
        50_000_000, ge=1, le=178_956_970, description="an image of more pixels is set aside before it is decoded"
    )
    encoding: Literal["raw", "png", "jpeg"] = Field("raw", description="how shards hold images; raw is read fastest")
    jpeg_quality: int = Field(92, ge=1, le=100, description="quality of `encoding: jpeg`; higher is larger and truer")
    keep_jpeg: bool = Field(
        False,
        description="with `encoding: jpeg` a JPEG file that has this shape and is upright already is stored as it is, "
        "and not decoded and encoded again; one of several pictures (MPO) is not kept",
    )
    decode: Literal["exact", "scaled"] = Field(
        "exact",
        description="scaled: a JPEG file much larger than `shape` is decoded at a half, a quarter or an eighth of its "
        "size: faster, about a grey level from exact",
    )
    decode_margin: float = Field(
        2.0,
        ge=1,
        le=16,
        description="`decode: scaled` leaves at least this many times the height and width of `shape` to resize from",
    )

    @model_validator(mode="after")
    def _shape_can_be_made(self) -> ImageSettings:
        if self.shape is not None and (self.shape[0] not in (1, 3) or min(self.shape) < 1):
            raise ValueError(f"shape {list(self.shape)}: write channels (1 or 3), height, width")
        if self.keep_jpeg and self.encoding != "jpeg":
            raise ValueError(f"keep_jpeg is for encoding: jpeg, this is encoding: {self.encoding}")
        return self


class DatasetSettings(FrozenModel):
    """The dataset on disk is what `ingest` writes and everything else reads."""

    path: str = Field("runs/datasets/fashion_mnist", description="folder or fsspec URL of the dataset")
    name: str = Field("fashion_mnist", min_length=1, description="name in the manifest, in MLflow and in reports")
    version: int | None = Field(None, ge=1, description="version to train on; null: the newest")
    source: SourceSettings = SourceSettings()
    image: ImageSettings = ImageSettings()
    append: bool = Field(False, description="add what is new in the source to the dataset, as a new version")
    seed: int = Field(0, ge=0, lt=1 << 63, description="seed of the split and of the shuffle on disk")
    validation_share: float = Field(
        1 / 12,
        ge=0,
        lt=1,
        description="share of training rows set apart as split `validation`, by a hash of the id, where the source has "
        "no such split",
    )
    test_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share of the rows set apart as split `test`, by a hash of the id, where the source has no splits; "
        "of one that has, `test` is what it says",
    )
    deduplicate: bool = Field(False, description="set aside all but one of images that are the same pixel for pixel")
    shard_bytes: int = Field(32 << 20, ge=1, le=1 << 30, description="bytes of images in one Parquet file, about")
    row_group_rows: int | None = Field(
        None,
        ge=1,
        description="rows of a row group, the unit of reading and shuffling; null: about 4 MB, at least 64 groups",
    )
    compression: Literal["none", "zstd"] = Field(
        "none", description="compression of the column `image`; none is read fastest"
    )
    max_bad_share: float = Field(0.01, ge=0, le=1, description="share of set-aside rows above which ingest fails")

    @model_validator(mode="after")
    def _shape_is_known(self) -> DatasetSettings:
        if self.image.shape is None and self.source.kind not in FIXED_SHAPE:
            raise ValueError(f"source.kind {self.source.kind} needs image.shape, for example [3, 64, 64]")
        if self.validation_share + self.test_share >= 1:
            raise ValueError(
                f"validation_share {self.validation_share} and test_share {self.test_share} leave no training rows: "
                "their sum must be below 1"
            )
        return self


class ReaderSettings(FrozenModel):
    """Training reads the shards of a dataset in this way.

    ``reader: petastorm`` is short for ``reader: {kind: petastorm}``.
    """

    kind: Literal["arrow", "petastorm"] = Field(
        "arrow",
        description="arrow: the same global batches for any number of workers; petastorm: make_batch_reader reads the "
        "training split, and of the other settings here only `verify` says how",
    )
    verify: Literal["shard", "off"] = Field(
        "shard", description="shard: compare each file with its SHA-256 when a process first reads it"
    )
    threads: int = Field(2, ge=1, description="threads of a worker that read row groups, and as many that decode")
    decode_in: Literal["processes", "threads"] = Field(
        "processes",
        description="where png and jpeg images are decoded, `threads` at a time. processes: none of it holds the "
        "interpreter lock that training needs; threads: fewer processes, the same pixels",
    )
    prefetch_batches: int = Field(
        16,
        ge=1,
        description="png and jpeg: at most half so many small batches are decoded "
        "together, as one block of up to 2 MB; raw images need none",
    )
    memory_bytes: int = Field(
        256 << 20,
        ge=0,
        description="a training split of at most this many bytes stays in each worker's memory once read",
    )
    gpu_bytes: int = Field(
        1 << 30,
        ge=0,
        description="an evaluated split, of which a worker's share has at most this many bytes, stays in the memory of "
        "its GPU once read",
    )
    cache: str | None = Field(None, description="folder on a local disk that keeps copies of remote shards")
    cache_bytes: int = Field(10 << 30, ge=1, description="bytes that the folder `cache` may hold")
