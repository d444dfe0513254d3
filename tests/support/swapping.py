"""Networks whose norms are swapped, and what tests ask of them."""

from __future__ import annotations

import torch
from torch import nn

from pipeline.config.model import ModelSettings

torch_norms = nn.modules.batchnorm._BatchNorm


def settings(norm, **changes):
    return ModelSettings(norm=norm, **{"norm_groups": 2, **changes})


def learned(network, seed=0):
    """In float64, with parameters and running statistics that no network starts with; it evaluates."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.double().modules():
        for name, values in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not values.is_floating_point():
                continue
            drawn = torch.randn(values.shape, generator=generator, dtype=torch.float64)
            if name in ("running_var", "var"):
                drawn = drawn.abs() + 0.5
            values.data.copy_(drawn / values[0].numel() ** 0.5 if values.ndim > 1 else drawn)
    return network.eval()


def rows(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def difference(one, other, x):
    with torch.inference_mode():
        return float((one(x) - other(x)).abs().max())


def layers(network, *types):
    return [name for name, module in network.named_modules() if isinstance(module, types)]


def gradients(network, x):
    """Outputs in training, and the gradient of each parameter."""
    network.train()
    network.zero_grad()
    outputs = network(x)
    (outputs * torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)).sum().backward()
    return outputs.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


def pair(*, bias=False, **options):
    return learned(nn.Sequential(nn.Conv2d(3, 4, 3, bias=bias), nn.BatchNorm2d(4, **options)))


def norm_of(network):
    return network[1]
