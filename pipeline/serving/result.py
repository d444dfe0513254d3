"""What an export is: the content of ``export.json``, and what every exported file takes and gives."""

from __future__ import annotations

from pipeline.config.frozen import FrozenModel

INPUT, OUTPUT = "images", "logits"
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


class ExportError(ValueError):
    """There is nothing to export, or what was exported is not the trained network."""


class ExportedFile(FrozenModel):
    """One file of an export.

    format : "pt2", "torchscript" or "onnx"
    bytes : its size
    sha256 : of its content, 64 hex digits
    largest_difference : of any logit from the trained network's, over the images compared
    accuracy : on these images, from 0 to 1
    """

    format: str
    bytes: int
    sha256: str
    largest_difference: float
    accuracy: float


class DatasetOrigin(FrozenModel):
    """The dataset that the network was trained on: its name, and its manifest's digest."""

    name: str
    digest: str


class Tensor(FrozenModel):
    """What goes into a network or comes out: its name, dtype and shape, whose first entry is the word "batch"."""

    name: str
    dtype: str
    shape: tuple[str | int, ...]


class FoldedNorms(FrozenModel):
    """The norm layers that became part of the layer before, and those that stayed, each with the reason."""

    folded: tuple[str, ...]
    left: dict[str, str]


class ComparedImages(FrozenModel):
    """The images on which files and network were compared: the first ones of a split."""

    split: str
    images: int


class ExportResult(FrozenModel):
    """What ``export.json`` holds.

    name : of the training
    network, norm : what was trained
    checkpoint : path of the file with the trained weights
    steps : optimizer steps of the training
    mlflow_run : id of its run
    dataset : what it was trained on
    classes : their names, in the order of the logits
    input, output : what every file takes and gives
    fold : which norm layers were folded
    compared_on : the images that the accuracies are of
    accuracy : of the trained network on them, from 0 to 1
    files : by name
    versions : of sparknorm, Python and the packages that wrote the files
    """

    name: str
    network: str
    norm: str
    checkpoint: str
    steps: int
    mlflow_run: str
    dataset: DatasetOrigin
    classes: tuple[str, ...]
    input: Tensor
    output: Tensor
    fold: FoldedNorms
    compared_on: ComparedImages
    accuracy: float
    files: dict[str, ExportedFile]
    versions: dict[str, str]
