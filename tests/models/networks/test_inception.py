"""What the branches of an Inception module see."""

import torch

from models.networks.inception import InceptionModule
from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings


def test_branches_of_an_inception_module_see_their_neighbourhoods():
    module = InceptionModule(2, 3, make_norm(ModelSettings(norm="none")), "sigmoid")
    x = torch.randn(1, 2, 9, 9, requires_grad=True)
    out = module(x)
    assert out.shape == (1, 12, 9, 9)
    for branch, side in zip(out.split(3, dim=1), (1, 3, 5, 3), strict=True):
        (seen,) = torch.autograd.grad(branch[0, :, 4, 4].sum(), x, retain_graph=True)
        rows, columns = torch.nonzero(seen.abs().sum((0, 1)), as_tuple=True)
        assert (len(rows), rows.max() - rows.min() + 1, columns.max() - columns.min() + 1) == (side**2, side, side)
