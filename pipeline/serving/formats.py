"""The formats that a network is exported to: torch.export, TorchScript and ONNX.

Every file takes uint8 images (N, C, H, W), any N, and gives float32 logits (N, classes).
"""

from __future__ import annotations

import importlib.util
import io
import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.config.study import ExportSettings
from pipeline.serving.result import INPUT, ONNX_PACKAGES, OUTPUT, ExportError

Run = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Format:
    """How a network becomes a file, and the file something to run.

    file : its name
    write : makes the file's bytes of a network in evaluation mode and an example of its input
    load : makes the bytes a function from images to logits
    """

    file: str
    write: Callable[[nn.Module, torch.Tensor], bytes]
    load: Callable[[bytes], Run]


def chosen_formats(settings: ExportSettings) -> list[str]:
    """The names of the formats to write, in the order of `FORMATS`.

    Raises
    ------
    ExportError
        ONNX is asked for, and its packages are missing.
    """
    missing = [package for package in ONNX_PACKAGES if importlib.util.find_spec(package) is None]
    if settings.formats is None:
        return [name for name in FORMATS if name != "onnx" or not missing]
    if "onnx" in settings.formats and missing:
        raise ExportError(
            f"export.formats has onnx, which needs {', '.join(missing)}: pip install 'sparknorm[onnx]', "
            "or leave it out of export.formats"
        )
    return [name for name in FORMATS if name in settings.formats]


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
