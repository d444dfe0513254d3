"""A network that is not of this package, tried on one small batch before anything is launched."""

from __future__ import annotations

import copy

import torch
from torch import nn

from models.imported import NetworkError, described
from models.layout import lay_out
from models.modes import evaluating
from models.recompute import recompute_in_backward

_ROWS = 4
_LISTED = 6  # parameters that a message names
_PASSES = 4  # in which a parameter without a gradient may get one


class Bfloat16Error(NetworkError):
    """The passes of a network are made on a CPU without autocast to bfloat16, and not with it."""


def check_trains(
    path: str,
    model: nn.Module,
    *,
    image_shape: tuple[int, int, int],
    num_classes: int,
    channels_last: bool = False,
    bf16: bool = False,
) -> None:
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
    channels_last, bf16 : bool
        The settings ``train.channels_last`` and ``train.bf16``.

    Raises
    ------
    NetworkError
        A pass raises; the logits have another shape than (N, num_classes), are no floats, or not finite; gradients are
        not finite, or do not reach a parameter; or a buffer changes its shape. A `Bfloat16Error` where only bfloat16
        is in the way, which GPUs may compute.
    """
    try:
        _check(path, model, image_shape, num_classes, channels_last=channels_last, bf16=bf16)
    except NetworkError as error:
        if error.__cause__ is None:  # no pass has raised
            raise
        if channels_last and _is_fine(path, model, image_shape, num_classes, channels_last=False, bf16=bf16):
            raise NetworkError(
                path,
                f"{error.problem}: with train.channels_last, the default, numbers lie in memory in another order; "
                "write .flatten(1) or .reshape instead of .view, or set it to false",
            ) from error
        if bf16 and _is_fine(path, model, image_shape, num_classes, channels_last=channels_last, bf16=False):
            raise Bfloat16Error(
                path, f"{error.problem}: on a CPU it cannot be trained with train.bf16; set it to false"
            ) from error
        raise


def _is_fine(path: str, model: nn.Module, *shape: object, **layout: bool) -> bool:
    try:
        _check(path, model, *shape, **layout)  # type: ignore[arg-type]
    except NetworkError:
        return False
    return True


def _check(
    path: str, model: nn.Module, image_shape: tuple[int, ...], num_classes: int, *, channels_last: bool, bf16: bool
) -> None:
    """What `check_trains` does, in one way."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    lay_out(model, memory_format)
    model.zero_grad()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (_ROWS, *image_shape), dtype=torch.uint8, generator=generator)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.randint(0, num_classes, (_ROWS,), generator=generator)
    shapes = _shapes_of_buffers(model)
    with torch.random.fork_rng(devices=[]):  # dropout draws
        logits = _logits(path, model, images, num_classes, bf16=bf16)
        if not logits.requires_grad:
            raise NetworkError(path, "its logits depend on no parameter that is trained (requires_grad)")
        try:
            nn.functional.cross_entropy(logits.float(), labels).backward()
        except RuntimeError as error:
            raise NetworkError(path, f"the backward pass raised {described(error, path)}") from error
        _check_gradients(path, model, images, labels)
        shapes = _check_buffers(path, model, shapes)
        with torch.inference_mode(), evaluating(model):
            _logits(path, model, images[:1], num_classes, bf16=bf16)
        _check_buffers(path, model, shapes)


def _shapes_of_buffers(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(buffer.shape) for name, buffer in model.named_buffers()}


def _check_buffers(path: str, model: nn.Module, before: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Check that buffers have the shapes that they had, and return those of all that there are now."""
    now = _shapes_of_buffers(model)
    for name, shape in before.items():
        if now.get(name) != shape:
            raise NetworkError(
                path,
                f"a forward pass makes the buffer {name.partition('.')[2]} of shape {shape} one of "
                f"{now.get(name, 'no shape')}: evaluation and checkpoints need buffers that keep their shape; keep "
                "what depends on the size of a batch in a plain attribute, or compute it anew",
            )
    return now


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
                nn.functional.cross_entropy(network(images).float(), labels).backward()
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


def _logits(path: str, model: nn.Module, images: torch.Tensor, num_classes: int, *, bf16: bool) -> torch.Tensor:
    """The logits of images, once they are what training can use."""
    mode = "training" if model.training else "evaluation"
    number = f"{len(images)} images" if len(images) > 1 else "one image"
    what = f"{mode} on {number} of {' x '.join(str(size) for size in images.shape[1:])}"
    try:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
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


def _check_gradients(path: str, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> None:
    trained = {name.partition(".")[2]: p for name, p in model.named_parameters() if p.requires_grad}
    idle = [name for name, parameter in trained.items() if parameter.grad is None]
    if idle:
        more = f" and {len(idle) - _LISTED} more" if len(idle) > _LISTED else ""
        for _ in range(_PASSES):
            nn.functional.cross_entropy(model(images).float(), labels).backward()
        if any(trained[name].grad is not None for name in idle):
            raise NetworkError(
                path,
                f"some passes give no gradient to {', '.join(idle[:_LISTED])}{more}, and some do: workers exchange "
                "all gradients in every pass; multiply what is left out by 0 instead, or set requires_grad to False",
            )
        raise NetworkError(
            path,
            f"no gradient reaches {', '.join(idle[:_LISTED])}{more}: use them in the forward pass, leave them out, or "
            "set requires_grad to False",
        )
    wrong = [name for name, p in trained.items() if p.grad is not None and not torch.isfinite(p.grad).all()]
    if wrong:
        raise NetworkError(path, f"the gradient of {wrong[0]} is not finite")
