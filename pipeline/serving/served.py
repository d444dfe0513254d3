"""A model folder: a folded network as a torch.export program, and ``served.json``, which says all that who runs it has
to know. Written last, it makes the folder whole. Its form is defined here alone.
"""

from __future__ import annotations

from typing import Literal

from pipeline.config.frozen import FrozenModel
from pipeline.ingest.images import ImageSpec
from pipeline.serving.result import ComparedImages, DatasetOrigin, FoldedNorms

FORMAT = 1
FILE, NETWORK_FILE = "served.json", "network.pt2"


class ServedModelError(ValueError):
    """A folder holds no model, a damaged one, or one that this version cannot run."""


class ServedImage(FrozenModel):
    """What becomes of every image before the network sees it: what `ingest` made of those it was trained on.

    The fields are those of `pipeline.ingest.images.ImageSpec` and

    max_bytes : a file of more is refused before it is decoded
    decode_margin : None where it is of no use, since files are decoded exactly
    """

    shape: tuple[int, int, int]
    resize: Literal["none", "crop", "letterbox"]
    background: int
    max_pixels: int
    encoding: Literal["raw", "png", "jpeg"]
    jpeg_quality: int
    formats: tuple[str, ...]
    max_bytes: int
    decode: Literal["exact", "scaled"] = "exact"
    decode_margin: float | None = None
    keep_jpeg: bool = False

    @property
    def spec(self) -> ImageSpec:
        """The same as `ingest` takes it."""
        return ImageSpec(**self.model_dump(exclude={"max_bytes"}, exclude_none=True))


class ServedModel(FrozenModel):
    """What ``served.json`` holds.

    format : of the folder, `FORMAT`
    name : of the training
    classes : their names, in the order of the probabilities
    image : what becomes of an image before the network sees it; scaling by mean and deviation is the network's first
        layer
    dataset : what it was trained on
    network, norm : what was trained
    fold : which norm layers became part of the layer before
    checkpoint : path of the file with the trained weights
    steps : optimizer steps of the training
    mlflow_run : id of its run
    compared_on : the images on which the file was compared with the trained network
    largest_difference : of any logit from the trained network's, on them
    sha256 : of the file `NETWORK_FILE`, 64 hex digits
    versions : of sparknorm, Python and the packages that wrote it
    """

    format: int = FORMAT
    name: str
    classes: tuple[str, ...]
    image: ServedImage
    dataset: DatasetOrigin
    network: str
    norm: str
    fold: FoldedNorms
    checkpoint: str
    steps: int
    mlflow_run: str
    compared_on: ComparedImages
    largest_difference: float
    sha256: str
    versions: dict[str, str]
