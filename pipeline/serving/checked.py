"""A network in a format, compared with the network itself: no file is published that gives other logits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.serving.formats import FORMATS, Run
from pipeline.serving.result import ExportedFile, ExportError

# How much a logit may differ from the trained network's, as a share of that network's largest logit over all images and
# classes: max |file - network| <= TOLERANCE * max |network|. In float32 rounding grows with what is summed, and folding
# changes the order of sums. Networks of six kinds, 1 to 57 layers deep, differ by at most 1.2e-6 when folded.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Reference:
    """What every file must give.

    images : uint8 (N, C, H, W)
    labels : int64 (N,)
    logits : float32 (N, classes), the trained network's for these images
    """

    images: torch.Tensor
    labels: torch.Tensor
    logits: torch.Tensor

    @property
    def accuracy(self) -> float:
        return accuracy_of(self.logits, self.labels)


def reference_of(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Reference:
    """Run the trained network on images."""
    return Reference(images, labels, logits_of(network, images))


def write_checked(
    name: str, network: nn.Module, reference: Reference, *, remedy: str | None = None
) -> tuple[bytes, ExportedFile]:
    """Write a network in the format of this name, load it again, and compare what it gives with the reference.

    Parameters
    ----------
    remedy : what to do if the network cannot be written so; None: leave the format out of an export

    Raises
    ------
    ExportError
        A logit differs by more than `TOLERANCE` of the largest one, or the network cannot be written in this format.
    """
    form = FORMATS[name]
    example = torch.zeros(2, *reference.images.shape[1:], dtype=torch.uint8)
    try:
        content = form.write(network, example)
    except Exception as error:  # of many kinds, by whatever a network of one's own does
        text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
        raise ExportError(
            f"the network cannot be written as {form.file}: {type(error).__name__}: {text}; "
            f"{remedy or f'leave {name} out of export.formats, or change what the network does there'}"
        ) from error
    logits = logits_of(form.load(content), reference.images)
    exported = ExportedFile(
        format=name,
        bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        largest_difference=largest_difference(form.file, logits, reference.logits),
        accuracy=accuracy_of(logits, reference.labels),
    )
    return content, exported


@torch.inference_mode()
def logits_of(run: Run, images: torch.Tensor) -> torch.Tensor:
    """The logits of images that are given in two batches, the first of one image: any batch size must do."""
    return torch.cat([run(batch) for batch in images.split([1, len(images) - 1]) if len(batch)])


def largest_difference(file: str, logits: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference of two logits, if it can be rounding; an ExportError that names the file otherwise."""
    difference, largest = float((logits - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * largest:  # NaN is not
        raise ExportError(
            f"{file} gives logits that differ by {difference:.2g} from the trained network's, the largest of which is "
            f"{largest:.2g}; rounding explains at most {TOLERANCE:g} of that: nothing was written"
        )
    return difference


def accuracy_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The share of images whose largest logit is their label's, from 0 to 1."""
    return float((logits.argmax(dim=1) == labels).double().mean())
