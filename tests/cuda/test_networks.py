"""Every network with every norm, on the device: layouts, dtypes, and the same numbers as on the CPU."""

import copy

import pytest
import small_imagenet
import torch
from small_networks import KINDS, make

from models.networks.inception import AveragePool
from models.norms.registry import NORMS

# torch's kernel of `instance` on the CPU gives contiguous output; the next convolution converts it.
CONVERTING = {"cpu": ["instance"], "cuda": []}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    if not torch.cuda.is_available():
        return
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def forward_and_backward(network, images, labels, bf16):
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        logits = network(images)
    loss = torch.nn.functional.cross_entropy(logits.float(), labels)
    loss.backward()
    return logits, loss


def batch(device, layout):
    random = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 8, 8), dtype=torch.uint8, generator=random)
    return images.to(device).contiguous(memory_format=layout), torch.arange(16, device=device) % 5


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_the_cpu(kind, norm, bf16, layout, cuda):
    """In float32 to rounding; with bfloat16 the loss, and that every gradient is there and finite."""
    on_cpu = make(kind, norm)
    on_gpu = copy.deepcopy(on_cpu).to(cuda).to(memory_format=layout)
    _, expected = forward_and_backward(on_cpu, *batch("cpu", torch.contiguous_format), bf16=False)
    logits, loss = forward_and_backward(on_gpu, *batch(cuda, layout), bf16)
    assert logits.device == cuda
    assert loss.item() == pytest.approx(expected.item(), rel=5e-2 if bf16 else 1e-4, abs=5e-2 if bf16 else 1e-4)
    # With instance norm the 2 x 2 pixels of the last stage are normalized one by one, which magnifies rounding.
    exact = not bf16 and (kind, norm) != ("inception", "instance")
    for (name, there), here in zip(on_gpu.named_parameters(), on_cpu.parameters(), strict=True):
        assert there.grad.isfinite().all(), name
        if exact:
            size = here.grad.norm().item()
            assert (there.grad.cpu() - here.grad).norm().item() <= 2e-3 * size + 1e-5, name


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
@pytest.mark.parametrize("norm", sorted(NORMS))
@pytest.mark.parametrize("kind", small_imagenet.NARROW)
def test_networks_for_imagenet_give_the_loss_of_the_cpu(kind, norm, bf16, cuda):
    """Without dropout, whose draws differ between devices; gradients are finite and, in float32, as large."""
    on_cpu = small_imagenet.make(kind, norm)
    for layer in on_cpu.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    on_gpu = copy.deepcopy(on_cpu).to(cuda).to(memory_format=torch.channels_last)
    images, labels = small_imagenet.images(8), torch.arange(8) % small_imagenet.CLASSES
    _, expected = forward_and_backward(on_cpu, images, labels, bf16=False)
    there = images.to(cuda).contiguous(memory_format=torch.channels_last)
    _, loss = forward_and_backward(on_gpu, there, labels.to(cuda), bf16)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-1 if bf16 else 1e-3, abs=1e-1 if bf16 else 1e-3)
    gradients = [torch.cat([p.grad.flatten() for p in each.parameters()]).cpu() for each in (on_gpu, on_cpu)]
    assert gradients[0].isfinite().all()
    if not bf16:  # where a group is two channels of a pixel, rounding to bfloat16 may make them equal
        assert gradients[0].norm().item() == pytest.approx(gradients[1].norm().item(), rel=1e-2)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_average_pooling_has_the_gradient_of_the_cpu(layout, cuda):
    pool, x = AveragePool(), torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for device in ("cpu", cuda):
        leaf = x.to(device).contiguous(memory_format=layout).clone(memory_format=torch.preserve_format).requires_grad_()
        (pool(leaf) * weights.to(device)).sum().backward()
        gradients.append(leaf.grad.cpu())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bf16"])
@pytest.mark.parametrize("norm", sorted(NORMS))
def test_a_norm_keeps_dtype_and_layout(norm, dtype, layout, device):
    from models.norms.registry import make_norm
    from pipeline.config.model import ModelSettings

    layer = make_norm(ModelSettings(norm=norm, norm_groups=2)).layer(8).to(device)
    x = torch.randn(6, 8, 4, 4).to(device, dtype).contiguous(memory_format=layout).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
        y = layer(x)
        evaluated = layer.eval()(x)
    assert y.shape == x.shape
    assert y.dtype == evaluated.dtype == dtype
    assert y.is_contiguous(memory_format=layout) or norm in CONVERTING[device.type]
    y.float().square().sum().backward()
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
