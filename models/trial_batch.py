"""A network that is not of this package, tried on one small batch before anything is launched."""

from __future__ import annotations

import copy

import torch
from torch import nn

from models.imported import NetworkError, described
from models.recompute import recompute_in_backward

_ROWS = 4
_LISTED = 6  # parameters that a message names


def check_trains(path: str, model: nn.Module, *, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Make a forward and a backward pass on a batch of random images, and evaluate one image.

    Parameters
    ----------
    path : str
        The import path, for messages.
    model : Module
        What `build_model` returns, on CPU: it takes uint8 images of shape (N, C, H, W). It gets gradients, and norms
        their statistics: the caller throws it away.
    image_shape : tuple of 3 ints
        C, H and W in pixels.
    num_classes : int

    Raises
    ------
    NetworkError
        A pass raises; the logits have another shape than (N, num_classes), are no floats, or not finite; gradients are
        not finite, or do not reach a parameter.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_ROWS, *image_shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (_ROWS,), generator=generator)
    with torch.random.fork_rng(devices=[]):  # dropout draws
        logits = _logits(path, model.train(), images, num_classes)
        if not logits.requires_grad:
            raise NetworkError(path, "its logits depend on no parameter that is trained (requires_grad)")
        try:
            nn.functional.cross_entropy(logits.float(), labels).backward()
        except RuntimeError as error:
            raise NetworkError(path, f"the backward pass raised {described(error, path)}") from error
        _check_gradients(path, model)
        with torch.inference_mode():
            _logits(path, model.eval(), images[:1], num_classes)


def check_recomputes(path: str, model: nn.Sequential, *, image_shape: tuple[int, int, int], num_classes: int) -> None:
    """Make a forward and a backward pass on random images, with blocks that are computed again and without.

    Parameters
    ----------
    path, model, image_shape, num_classes
        As in `check_trains`.

    Raises
    ------
    NetworkError
        There are no blocks, a pass raises, or gradients or buffers are others than without.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_ROWS, *image_shape), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (_ROWS,), generator=generator)
    again = copy.deepcopy(model)
    try:
        recompute_in_backward(again[1])
        for network in (model, again):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                nn.functional.cross_entropy(network.train()(images).float(), labels).backward()
    except Exception as error:
        raise NetworkError(path, f"train.gradient_checkpointing: {described(error, path)}") from error
    values = (
        {name: p.grad for name, p in network.named_parameters() if p.grad is not None} | dict(network.named_buffers())
        for network in (model, again)
    )
    first, second = values
    if other := [name for name in first if not torch.allclose(first[name], second[name], rtol=1e-3, equal_nan=True)]:
        raise NetworkError(
            path,
            f"train.gradient_checkpointing changes {other[0].partition('.')[2]}: its blocks do not compute the same "
            "the second time, since they change something other than their own buffers; set it to false",
        )


def _logits(path: str, model: nn.Module, images: torch.Tensor, num_classes: int) -> torch.Tensor:
    """The logits of images, once they are what training can use."""
    mode = "training" if model.training else "evaluation"
    number = f"{len(images)} images" if len(images) > 1 else "one image"
    what = f"{mode} on {number} of {' x '.join(str(size) for size in images.shape[1:])}"
    try:
        logits = model(images)
    except Exception as error:
        raise NetworkError(path, f"{what} raised {described(error, path)}") from error
    expected = (len(images), num_classes)
    if not isinstance(logits, torch.Tensor):
        raise NetworkError(
            path, f"{what} gave a {type(logits).__name__}, and must give one tensor {expected} of logits"
        )
    if tuple(logits.shape) != expected:
        raise NetworkError(path, f"{what} gave the shape {tuple(logits.shape)}, and must give logits {expected}")
    if not logits.is_floating_point():
        raise NetworkError(path, f"{what} gave {logits.dtype}, and logits are floats")
    if not torch.isfinite(logits).all():
        raise NetworkError(path, f"{what} gave logits that are not finite")
    return logits


def _check_gradients(path: str, model: nn.Module) -> None:
    trained = {name.partition(".")[2]: p for name, p in model.named_parameters() if p.requires_grad}
    idle = [name for name, parameter in trained.items() if parameter.grad is None]
    if idle:
        more = f" and {len(idle) - _LISTED} more" if len(idle) > _LISTED else ""
        raise NetworkError(
            path,
            f"no gradient reaches {', '.join(idle[:_LISTED])}{more}: use them in the forward pass, leave them out, or "
            "set requires_grad to False",
        )
    wrong = [name for name, p in trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if wrong:
        raise NetworkError(path, f"the gradient of {wrong[0]} is not finite")
