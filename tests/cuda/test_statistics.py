"""Batch norm over ranks and by lane on the device, and ranks of a process group that share one."""

import copy

import pytest
import torch
from ranks import run_ranks

from models.norms.registry import make_norm
from pipeline.config.model import ModelSettings
from pipeline.distributed.gradients import GradientExchange
from pipeline.training import norm_statistics

SHAPES = {"channels_last": (6, 8, 5, 5), "contiguous": (6, 8, 5, 5), "features": (6, 8)}


def layer_of(statistics, device, **changes):
    torch.manual_seed(1)
    made = make_norm(ModelSettings(norm="batch", norm_statistics=statistics, **changes)).layer(8).to(device)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter)
    return made


def rows(shape, device, dtype=torch.float32, layout=None):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype) * 3 + 1
    return x.contiguous(memory_format=torch.channels_last) if layout == "channels_last" else x


def results(layer, x, grad):
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(grad)
    gradients = [parameter.grad for parameter in layer.parameters()]
    return [t.detach().float().cpu() for t in (y, x.grad, *gradients, layer.running_mean, layer.running_var)]


@pytest.mark.parametrize("affine", ["learned", "off"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("layout", SHAPES)
def test_statistics_of_the_world_are_those_of_all_rows(layout, dtype, affine, device):
    """A world of two that is one: the sum over ranks doubles, as if another rank had the same rows."""
    changes = {"norm_scale": affine, "norm_shift": affine}
    alone, doubled = (layer_of(statistics, device, **changes) for statistics in ("rank", "world"))
    doubled.sum_over_ranks = lambda values: values.mul_(2)
    x, grad = rows(SHAPES[layout], device, dtype, layout), rows(SHAPES[layout], device, dtype, layout).flip(0)
    count = x.numel() // 8
    # From the same rounded rows, but computed in float32.
    mine, theirs = results(doubled, x, grad), results(alone, x.float(), grad.float())
    # The unbiased variance of twice the rows: the same sum of squares over another number.
    theirs[-1] = (theirs[-1] - 0.9) * ((count - 1) / count) * (2 * count / (2 * count - 1)) + 0.9
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).norm() <= tolerance * (1 + other.norm())


def test_a_world_with_one_value_in_a_channel_is_refused(device):
    layer = layer_of("world", device)
    layer.sum_over_ranks = lambda values: values
    with pytest.raises(ValueError, match="only one value in a channel"):
        layer(torch.randn(1, 8, device=device))


@pytest.mark.parametrize("layout", SHAPES)
def test_statistics_by_lane_are_those_of_each_part(layout, device):
    by_lane, alone = layer_of("lane", device), layer_of("rank", device)
    by_lane.lanes = 3
    x, grad = rows(SHAPES[layout], device, layout=layout), rows(SHAPES[layout], device, layout=layout).flip(0)
    mine = results(by_lane, x, grad)
    parts = [results(copy.deepcopy(alone), part, by) for part, by in zip(x.chunk(3), grad.chunk(3), strict=True)]
    together = [torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])]
    together += [sum(part[at] for part in parts) for at in (2, 3)]
    together += [sum(part[at] for part in parts) / 3 for at in (4, 5)]
    for one, other in zip(mine, together, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def one_step(worker, statistics):
    """Gradients of the global batch through DistributedDataParallel; each rank takes its half of the rows."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # of this process, which ends then
    torch.manual_seed(0)
    norm = make_norm(ModelSettings(norm="batch", norm_statistics=statistics)).layer(8)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), norm, torch.nn.Flatten(), torch.nn.Linear(8 * 9, 4))
    model = model.to(worker.device).to(memory_format=torch.channels_last)
    norm_statistics.connect(model, worker, lanes=2 // worker.world_size)
    x = torch.randn(8, 3, 5, 5, generator=torch.Generator().manual_seed(3)).chunk(worker.world_size)[worker.rank]
    exchange = GradientExchange(worker, model, "none")
    images = x.to(worker.device).contiguous(memory_format=torch.channels_last)
    exchange.warm_up(lambda: exchange.forward(images).square().mean())
    exchange.forward(images).square().mean().backward()
    return [parameter.grad.cpu().numpy() for parameter in model.parameters()]


@pytest.mark.parametrize("statistics", ["world", "lane"])
def test_two_ranks_have_the_gradients_of_one(statistics, device):
    """Over gloo, which lets two ranks share a GPU."""
    (alone,) = run_ranks(one_step, 1, statistics, device=device.type)
    for rank in run_ranks(one_step, 2, statistics, device=device.type):
        for mine, whole in zip(rank, alone, strict=True):
            torch.testing.assert_close(torch.from_numpy(mine), torch.from_numpy(whole), rtol=1e-4, atol=1e-5)
