"""Norm layers on a CPU: inference with batch norm folded into the convolutions against without, and a step through our
batch norm against one through torch's. No Spark, no data: random images of Fashion-MNIST's shape.

Contenders take turns, pass by pass, with two torch threads and channels_last.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch
from results import Result, compare, leave
from torch import nn

from models import build_model
from models.fold import fold
from models.norms.batch import BatchNorm
from pipeline.config.model import ModelSettings

PASSES = int(os.environ.get("BENCH_PASSES", "35"))
# Time of a pass, of which as much again goes before the first one and is not counted. Many short turns: noise that
# lasts seconds meets both contenders.
SECONDS = float(os.environ.get("BENCH_SECONDS", "0.4"))
THREADS, BATCH = 2, 256
FOLDED, UNFOLDED = "sparknorm, ResNet-20 inference, folded", "ResNet-20 inference, not folded"
# Folding also lets ReLUs work in place: without that, its own part is seen.
IN_PLACE = "ResNet-20 inference, not folded, ReLUs in place"
# Activations of the ResNet-20's three stages, at a training batch of 128.
SHAPES = ((128, 16, 28, 28), (128, 32, 14, 14), (128, 64, 7, 7))


def run() -> None:
    """Measure every contender; print, plot and write the results."""
    torch.set_num_threads(THREADS)
    networks = {FOLDED: _inference(folded=True), UNFOLDED: _inference(), IN_PLACE: _inference(in_place=True)}
    results = [Result(name, "images/s", passes) for name, passes in _take_turns(networks, BATCH).items()]
    pairs = [(FOLDED, UNFOLDED), (FOLDED, IN_PLACE)]
    for shape in SHAPES:
        for layout in (torch.contiguous_format, torch.channels_last):
            # Torch's against itself shows what of a ratio is the machine's.
            ours, torchs, again = (
                f"{who} {_describe(shape, layout)}"
                for who in ("sparknorm, batch norm", "torch batch norm", "torch batch norm once more")
            )
            layers = {ours: BatchNorm(shape[1]), torchs: nn.BatchNorm2d(shape[1]), again: nn.BatchNorm2d(shape[1])}
            given = [torch.randn(shape).contiguous(memory_format=layout) for _ in range(2)]
            steps = {name: _step(layer, *given) for name, layer in layers.items()}
            results += [Result(name, "steps/s", passes) for name, passes in _take_turns(steps, 1).items()]
            pairs += [(ours, torchs), (again, torchs)]
    leave(
        "norms", results + [compare(results, *pair) for pair in pairs], f"norm layers, {THREADS} threads, batch {BATCH}"
    )


def _describe(shape: tuple[int, ...], layout: torch.memory_format) -> str:
    return f"{shape[1]} x {shape[2]} x {shape[3]}" + (", channels_last" if layout == torch.channels_last else "")


def _take_turns(contenders: dict[str, Callable[[], None]], count: int) -> dict[str, list[float]]:
    """``count`` times the calls in a second, of each contender in each pass but the first."""
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(PASSES + 1):
        order = list(contenders.items())
        for name, call in order if number % 2 else reversed(order):
            calls, started = 0, time.perf_counter()
            while time.perf_counter() < started + SECONDS:
                call()
                calls += 1
            if number:
                speeds[name].append(count * calls / (time.perf_counter() - started))
    return speeds


def _inference(*, folded: bool = False, in_place: bool = False) -> Callable[[], None]:
    settings = ModelSettings(network="resnet", depth=20, width=16, norm="batch")
    model: nn.Module = build_model(settings, image_shape=(1, 28, 28), num_classes=10).eval()
    if folded:
        model = fold(model).model
    if in_place:
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = True
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randint(0, 256, (BATCH, 1, 28, 28), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    return functools.partial(torch.inference_mode()(model), images)


def _step(layer: nn.Module, x: torch.Tensor, gradient: torch.Tensor) -> Callable[[], None]:
    """Forward and backward in training, as inside a network: the gradient by the input is asked for too. All
    contenders get the same tensors: where in memory they lie makes a difference."""
    x.requires_grad_()

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(gradient)

    return step
