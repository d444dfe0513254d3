"""The depth of the resnet, and how its blocks start."""

import pytest
import torch
from small_networks import make, widths_of


@pytest.mark.parametrize(("kind", "depth"), [("resnet", 8), ("resnet", 20), ("bottleneck", 11), ("bottleneck", 29)])
def test_depth_of_the_resnet(kind, depth):
    widths = widths_of(kind, depth)
    assert len(widths) + 1 == depth  # and the classifier
    assert widths[-1] == (32 if kind == "resnet" else 128)


@pytest.mark.parametrize("kind", ["resnet", "bottleneck"])
def test_residual_blocks_start_as_the_identity(kind):
    depth = {"resnet": 14, "bottleneck": 20}[kind]
    block = make(kind, depth=depth)[1].blocks[1]
    x = torch.rand(2, block.conv1.in_channels, 4, 4)
    assert torch.equal(block(x), x)
    for changes in ({"zero_init": False}, {"norm_scale": "fixed"}, {"norm_scale": "off"}, {"norm": "none"}):
        assert not torch.equal(make(kind, depth=depth, **changes)[1].blocks[1](x), x)
