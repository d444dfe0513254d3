"""The depth of the plain CNN."""

import pytest
from small_networks import widths_of


@pytest.mark.parametrize(("depth", "counts"), [(3, [1, 1, 1]), (4, [1, 1, 2]), (5, [1, 2, 2]), (9, [3, 3, 3])])
def test_depth_of_the_cnn(depth, counts):
    assert [widths_of("cnn", depth).count(width) for width in (8, 16, 32)] == counts
