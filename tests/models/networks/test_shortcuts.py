"""Shortcuts of few channels: the same function as a 1x1 convolution with a stride, and no memory is overwritten."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_networks import make
from torch.nn import functional

REPOSITORY = Path(__file__).parents[3]
# The heap is checked at every free, so that a write beyond its blocks ends the process.
BACKWARD = """
import sys, torch
from models import build_model
from pipeline.config.model import ModelSettings

network, depth, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
model = build_model(
    ModelSettings(network=network, depth=depth, width=width), image_shape=(3, 64, 64), num_classes=3
).to(memory_format=torch.channels_last)
for step in range(8):
    images = torch.randint(0, 255, (8, 3, 64, 64), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    model(images).logsumexp(1).sum().backward()
print("whole")
"""


@pytest.mark.parametrize(("kind", "depth"), [("resnet", "8"), ("wide_resnet", "10")])
@pytest.mark.parametrize("width", ["4", "8"])
def test_few_channels_in_channels_last_leave_the_heap_whole(kind, depth, width):
    done = subprocess.run(
        [sys.executable, "-c", BACKWARD, kind, depth, width],
        env={**os.environ, "MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "7", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "whole\n"), done.stderr[-2000:]


@pytest.mark.parametrize(("kind", "depth"), [("resnet", 8), ("bottleneck", 11), ("wide_resnet", 10)])
@pytest.mark.parametrize("width", [8, 16])
def test_a_shortcut_is_a_convolution_with_the_stride_of_its_block(kind, depth, width):
    blocks = [m for m in make(kind, depth=depth, width=width, norm="none").modules() if hasattr(m, "shortcut")]
    for block in (block.double() for block in blocks if len(list(block.shortcut.parameters()))):
        (shortcut,) = (m for m in block.shortcut.modules() if isinstance(m, torch.nn.Conv2d))
        stride = max(m.stride[0] for m in block.modules() if isinstance(m, torch.nn.Conv2d))
        if shortcut.in_channels < 16:
            assert shortcut.stride == (1, 1)
        x = torch.rand(2, shortcut.in_channels, 7, 6, dtype=torch.float64)
        with torch.no_grad():
            for m in block.modules():  # nothing but the shortcut is left
                if isinstance(m, torch.nn.Conv2d) and m is not shortcut:
                    m.weight.zero_()
                    if m.bias is not None:
                        m.bias.zero_()
            found = block(x)
            expected = functional.conv2d(x, shortcut.weight, shortcut.bias, stride=stride)
        if kind != "wide_resnet":
            expected = expected.relu()
        torch.testing.assert_close(found, expected)
