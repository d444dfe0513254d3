"""Normalization of segments against its formula in float64, by Triton's kernels and by whole-tensor operations."""

import pytest
import torch

from models.norms import segments

# (N, C, H, W), segments, channels of a group; the second has rows and channels that fill no tile.
CASES = {
    "lanes": ((8, 16, 5, 5), 4, 1),
    "many rows": ((64, 70, 33, 31), 2, 1),
    "samples": ((6, 24, 7, 3), 6, 1),
    "groups": ((6, 24, 7, 3), 6, 4),
    "large groups": ((5, 512, 3, 3), 5, 256),
    "features": ((12, 40), 3, 1),
}


@pytest.fixture(params=["kernels", "operations"])
def kernels(request, monkeypatch, device):
    if request.param == "operations":
        monkeypatch.setattr(segments, "segment_kernels", None)
    elif device.type == "cpu":
        pytest.skip("Triton's kernels are for CUDA")
    elif segments.segment_kernels is None:
        pytest.fail("a torch for CUDA without Triton")
    else:
        assert segments.kernels_work(device)


def expected(x, weight, bias, grad, count, group_channels):
    """By autograd, in float64, segment by segment."""
    x, grad, weight, bias = (
        None if values is None else values.detach().double().cpu() for values in (x, grad, weight, bias)
    )
    for values in (x, weight, bias):
        if values is not None:
            values.requires_grad_()
    parts = []
    for part in x.chunk(count):
        rows = part.movedim(1, 0).reshape(x.shape[1] // group_channels, -1)
        variance, mean = torch.var_mean(rows, 1, correction=0, keepdim=True)
        shape = (x.shape[1], len(part), *x.shape[2:])
        parts.append(((rows - mean) / (variance + 1e-5).sqrt()).reshape(shape).movedim(0, 1))
    y = torch.cat(parts)
    if weight is not None:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        y = y * weight.view(shape) + bias.view(shape)
    y.backward(grad)
    return [y, x.grad, *(v.grad for v in (weight, bias) if v is not None)]


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_formula(case, dtype, affine, kernels, device):
    """Rows far from zero: sums of squares alone would lose the variance."""
    shape, count, group_channels = CASES[case]
    random = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    x, grad = ((values * 2 + far).to(dtype).contiguous(memory_format=layout) for values, far in ((x, 20), (grad, 0)))
    scale = [torch.randn(shape[1], generator=random).to(device).requires_grad_() if affine else None for _ in range(2)]
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    found = segments.normalize_segments(leaf, *scale, 1e-5, segments=count, group_channels=group_channels)
    found.y.backward(grad)
    assert found.y.dtype == leaf.grad.dtype == dtype
    assert found.y.is_contiguous(memory_format=layout)
    assert leaf.grad.is_contiguous(memory_format=layout)
    mine = [found.y, leaf.grad, *(values.grad for values in scale if values is not None)]
    for one, other in zip(mine, expected(x, *scale, grad, count, group_channels), strict=True):
        error = (one.detach().double().cpu() - other.detach()).norm() / other.detach().norm()
        assert error < (1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_the_same_rows_give_the_same_bits(kernels, device):
    x = torch.randn(64, 70, 33, 31, generator=torch.Generator().manual_seed(1)).to(device)
    x = x.contiguous(memory_format=torch.channels_last)
    once, again = (segments.normalize_segments(x, None, None, 1e-5, segments=4) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(once, again, strict=True))
