"""Norm layers on one GPU against torch's own: forward and backward in bfloat16 and channels_last, in turn, by events.

Statistics of the world are measured with two ranks that share the GPU over gloo, against torch's SyncBatchNorm.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from results import Result, compare, leave
from torch import nn

sys.path.append(str(Path(__file__).parents[1] / "support"))

from ranks import run_ranks

from models.norms.batch import BatchNorm
from models.norms.group import GroupNorm
from models.norms.instance import InstanceNorm

PASSES = int(os.environ.get("BENCH_PASSES", "9"))
ROUNDS = 20  # forward and backward passes of a pass
SHAPES = {"64 x 28 x 28": (1024, 64, 28, 28), "512 x 7 x 7": (256, 512, 7, 7)}
LANES = 16
# Ranks over gloo exchange through the host, which takes most of the time: as small as what such ranks would train.
WORLD_SHAPE = (256, 64, 28, 28)


def by_lane(channels: int) -> nn.Module:
    layer = BatchNorm(channels, statistics="lane")
    layer.lanes = LANES
    return layer


def contenders(channels: int) -> dict[str, tuple[nn.Module, str | None]]:
    """Layers by name, each with the name of the one that it is compared with."""
    return {
        "torch batch norm": (nn.BatchNorm2d(channels), None),
        "sparknorm, batch norm": (BatchNorm(channels), "torch batch norm"),
        f"sparknorm, batch norm by {LANES} lanes": (by_lane(channels), "torch batch norm"),
        "torch group norm": (nn.GroupNorm(8, channels), None),
        "sparknorm, group norm": (GroupNorm(channels, groups=8), "torch group norm"),
        "torch instance norm": (nn.InstanceNorm2d(channels, affine=True), None),
        "sparknorm, instance norm": (InstanceNorm(channels), "torch instance norm"),
    }


def run() -> None:
    """Leave ``gpu_norms.json``: forward and backward passes a second."""
    results: list[Result] = []
    pairs = []
    for shape_name, shape in SHAPES.items():
        layers = contenders(shape[1])
        times = _in_turn({name: _step(layer, shape) for name, (layer, _) in layers.items()})
        results += [Result(f"{shape_name}: {name}", "passes/s", passes) for name, passes in times.items()]
        pairs += [(f"{shape_name}: {a}", f"{shape_name}: {b}") for a, (_, b) in layers.items() if b]
    world = run_ranks(_world, 2, device="cuda")[0]
    results += [Result(f"two ranks: {name}", "passes/s", passes) for name, passes in world.items()]
    first, second = (f"two ranks: {name}" for name in world)
    pairs.append((first, second))
    leave(
        "gpu_norms",
        results + [compare(results, *pair) for pair in pairs],
        f"norms, forward and backward, bf16, channels_last, {torch.cuda.get_device_name()}",
    )


def _step(layer: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    layer.cuda()
    x = torch.randn(shape, device="cuda").to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    grad = torch.randn_like(x)

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16):
            y = layer(x)
        y.backward(grad.to(y.dtype))
        x.grad = None

    return step


def _in_turn(steps: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Passes a second of each, pass by pass; one more goes before the first and is not counted."""
    speeds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(PASSES + 1):
        for name, step in steps.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(ROUNDS):
                step()
            end.record()
            end.synchronize()
            if number:
                speeds[name].append(ROUNDS / (begin.elapsed_time(end) / 1000))
    return speeds


def _world(worker) -> dict[str, list[float]]:
    ours = BatchNorm(WORLD_SHAPE[1], statistics="world")
    ours.sum_over_ranks = worker.all_reduce_sum
    return _in_turn(
        {
            "sparknorm, statistics of the world": _step(ours, WORLD_SHAPE),
            "torch SyncBatchNorm": _step(nn.SyncBatchNorm(WORLD_SHAPE[1]), WORLD_SHAPE),
        }
    )


if __name__ == "__main__":
    run()
