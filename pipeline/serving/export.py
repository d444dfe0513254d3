"""A trained network as files that serve it without this package: `torch.export`, TorchScript and ONNX.

Every file takes uint8 images (N, C, H, W), any N, and gives float32 logits (N, classes); what a file gives is compared
with what the trained network gives before the file is published.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import io
import json
import logging
import platform
import warnings
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models import build_model
from models.fold import Folded, fold
from pipeline import __version__, storage
from pipeline.config.settings import Settings
from pipeline.config.study import ExportSettings
from pipeline.data import load_manifest, reader
from pipeline.data.manifest import Manifest
from pipeline.data.shards import SplitFiles
from pipeline.driver.record import finished_record, slug
from pipeline.training import checkpoint
from pipeline.training.job import Job, identity

FILE = "export.json"
INPUT, OUTPUT = "images", "logits"
# At most this many images are compared, and at most this much may a logit differ.
IMAGES, TOLERANCE = 500, 1e-4
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")

Run = Callable[[torch.Tensor], torch.Tensor]


class ExportError(ValueError):
    """There is nothing to export, or what was exported is not the trained network."""


@dataclass(frozen=True)
class Format:
    """How a network (and an example of its input) becomes the bytes of a file, and the bytes something to run."""

    file: str
    write: Callable[[nn.Module, torch.Tensor], bytes]
    load: Callable[[bytes], Run]


@dataclass(frozen=True)
class Trained:
    """A network whose training has ended, in evaluation mode, and the job that it was trained by."""

    network: nn.Module
    job: Job
    manifest: Manifest
    checkpoint: str
    result: dict[str, Any]


def export(settings: Settings, *, name: str) -> tuple[str, dict[str, Any]]:
    """Write the newest network that was trained with these settings into ``export/NAME`` of the output folder.

    Parameters
    ----------
    name : of the training, as it was given to `run_trial`

    Returns
    -------
    path : str
        of ``export.json``, which is written last: without it the export is not whole
    content : dict

    Raises
    ------
    ExportError
        No such training has ended, packages are missing, or a file gives other logits than the trained network.
    FoldError
        ``export.fold`` is true, and a norm layer cannot be folded.
    """
    formats = _formats(settings.export)
    folder = storage.join(settings.output, "export", slug(name))
    storage.remove(folder)  # what fails must not look like the export before it
    trained = find_trained(settings, name)
    images, labels = _images(trained, settings)
    folded = _fold(trained.network, settings.export)
    batches = [part for part in images.split([1, len(images) - 1]) if len(part)]  # any batch size, one too
    expected = _logits(trained.network, batches)
    files, written = {}, {}
    for kind in formats:
        form = FORMATS[kind]
        data = written[form.file] = form.write(folded.model, torch.zeros(2, *images.shape[1:], dtype=torch.uint8))
        logits = _logits(form.load(data), batches)
        files[form.file] = {
            "format": kind,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
            "largest_difference": _difference(form.file, logits, expected),
            "accuracy": _accuracy(logits, labels),
        }
    content = {
        **_origin(trained, name),
        "fold": {"folded": list(folded.folded), "left": folded.left},
        "compared_on": {"split": settings.train.evaluate_on, "images": len(images)},
        "accuracy": _accuracy(expected, labels),
        "files": files,
        "versions": _versions(formats),
    }
    for file, data in written.items():
        storage.publish(storage.join(folder, file), data)
    path = storage.join(folder, FILE)
    storage.publish(path, json.dumps(content, indent=1, allow_nan=False).encode())
    return path, content


def find_trained(settings: Settings, name: str) -> Trained:
    """The newest finished training of these settings, as `run_trial` leaves it in the output folder.

    Raises
    ------
    ExportError
        There is none, it diverged, or its last checkpoint is gone.
    """
    manifest = load_manifest(settings.dataset.path, settings.dataset.version)
    dataset = storage.absolute(settings.dataset.path)
    job = Job(dataset, "", settings.model, settings.train, reader=settings.reader, version=manifest.version)
    key = identity(job)
    trials = storage.join(storage.absolute(settings.output), "trials")
    record = finished_record(trials, name, {"parent": None, **key})
    result = record.content.result if record else None
    if record is None or not isinstance(result, dict):
        raise ExportError(
            f"{trials} has no finished training {name!r} with these settings and this dataset: run `sparknorm train` "
            "with the same settings first"
        )
    if result["diverged"]:
        raise ExportError(f"the newest training in {record.folder} diverged: train with other settings first")
    checkpoints = storage.join(record.folder, "checkpoints")
    state = checkpoint.load_newest(checkpoints, identity=key, device=torch.device("cpu"))
    if state is None or state["progress"]["step"] != result["steps"]:
        raise ExportError(f"{checkpoints} has no whole checkpoint of the last step, {result['steps']}: train again")
    network = build_model(job.model, image_shape=manifest.image.shape, num_classes=len(manifest.classes))
    network.load_state_dict(state["model"])  # the mean and deviation of the dataset's pixels too
    path = storage.join(checkpoints, f"step-{result['steps']:08d}.pt")
    return Trained(network.eval().requires_grad_(False), job, manifest, path, result)


def _fold(network: nn.Module, settings: ExportSettings) -> Folded:
    if settings.fold is False:
        return Folded(network, (), {})
    return fold(network, partial=settings.fold == "auto")


def _images(trained: Trained, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """The first images of the split that the training was judged on: uint8 (N, C, H, W), int64 (N,)."""
    images: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    job, rows = trained.job, 0
    with closing(SplitFiles(job.dataset, trained.manifest, settings.train.evaluate_on, job.reader)) as files:
        for block in reader.evaluation_blocks(files, rank=0, world_size=1, batch_size=IMAGES):
            images += [batch.images for batch in block]
            labels += [batch.labels for batch in block]
            rows += sum(len(batch.labels) for batch in block)
            if rows >= IMAGES:
                break
    return torch.cat(images)[:IMAGES], torch.cat(labels)[:IMAGES]


@torch.inference_mode()
def _logits(run: Run, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([run(batch) for batch in batches])


def _difference(file: str, logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest, if it can be rounding."""
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE:  # NaN is not
        raise ExportError(
            f"{file} gives logits that differ by {difference:.2g} from the trained network's, and rounding explains at "
            f"most {TOLERANCE:g}: nothing was written"
        )
    return difference


def _accuracy(logits: torch.Tensor, labels: torch.Tensor) -> float:
    return float((logits.argmax(dim=1) == labels).double().mean())


def _origin(trained: Trained, name: str) -> dict[str, Any]:
    manifest, model = trained.manifest, trained.job.model
    return {
        "name": name,
        "network": model.network,
        "norm": model.norm,
        "checkpoint": trained.checkpoint,
        "steps": trained.result["steps"],
        "mlflow_run": trained.result["run_id"],
        "dataset": {"name": manifest.name, "digest": manifest.digest},
        "classes": list(manifest.classes),
        "input": {"name": INPUT, "dtype": "uint8", "shape": ["batch", *manifest.image.shape]},
        "output": {"name": OUTPUT, "dtype": "float32", "shape": ["batch", len(manifest.classes)]},
    }


def _versions(formats: Sequence[str]) -> dict[str, str]:
    packages = ("torch", "numpy", *(_ONNX_PACKAGES if "onnx" in formats else ()))
    found = {package: importlib.metadata.version(package) for package in packages}
    return {"sparknorm": __version__, "python": platform.python_version(), **found}


def _formats(settings: ExportSettings) -> list[str]:
    missing = [package for package in _ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if settings.formats is None:
        return [kind for kind in FORMATS if kind != "onnx" or not missing]
    if "onnx" in settings.formats and missing:
        raise ExportError(
            f"export.formats has onnx, which needs {', '.join(missing)}: pip install 'sparknorm[onnx]', "
            "or leave it out of export.formats"
        )
    return [kind for kind in FORMATS if kind in settings.formats]


def _program(network: nn.Module, example: torch.Tensor) -> torch.export.ExportedProgram:
    return torch.export.export(network, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _to_pt2(network: nn.Module, example: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.export.save(_program(network, example), buffer)
    return buffer.getvalue()


def _from_pt2(data: bytes) -> Run:
    return torch.export.load(io.BytesIO(data)).module()


def _to_torchscript(network: nn.Module, example: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # torch recommends torch.export, which is the other format, and doubts what is compared at another batch size.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        with torch.inference_mode():
            traced = torch.jit.trace(network, example)
        torch.jit.save(torch.jit.freeze(traced), buffer)
    return buffer.getvalue()


def _from_torchscript(data: bytes) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.load(io.BytesIO(data))


def _to_onnx(network: nn.Module, example: torch.Tensor) -> bytes:
    log = logging.getLogger("torch.onnx")  # which says that torchvision is not here
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own code
            program = torch.onnx.export(
                _program(network, example), dynamo=True, input_names=[INPUT], output_names=[OUTPUT], verbose=False
            )
    finally:
        log.setLevel(level)
    assert program is not None
    return program.model_proto.SerializeToString()


def _from_onnx(data: bytes) -> Run:
    import onnxruntime

    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run([OUTPUT], {INPUT: images.numpy()})[0])


FORMATS = {
    "pt2": Format("model.pt2", _to_pt2, _from_pt2),
    "torchscript": Format("model.ts", _to_torchscript, _from_torchscript),
    "onnx": Format("model.onnx", _to_onnx, _from_onnx),
}
