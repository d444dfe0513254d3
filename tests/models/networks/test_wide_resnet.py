"""The depth, width and shortcuts of the wide resnet."""

import pytest
import torch
from small_networks import make, widths_of
from torch import nn


@pytest.mark.parametrize("depth", [10, 22])
def test_depth_and_width_of_the_wide_resnet(depth):
    widths = widths_of("wide_resnet", depth, widen=3)
    assert widths == [8] + [width for width in (24, 48, 96) for _ in range((depth - 4) // 3)]
    shortcuts = [name for name, m in make("wide_resnet", depth=depth, widen=3).named_parameters() if "shortcut" in name]
    assert len(widths) + len(shortcuts) == depth


def test_the_shortcut_of_a_wide_resnet_is_left_alone():
    block = make("wide_resnet", depth=16)[1].blocks[1]
    x = torch.randn(2, 8, 4, 4)
    assert not torch.equal(block(x), x)
    nn.init.zeros_(block.conv2.weight)
    assert torch.equal(block(x), x)
