"""Blocks that are computed again in the backward pass: the same numbers, nothing counted twice, less memory."""

import contextlib

import pytest
import small_imagenet
import torch
from small_networks import make as make_small
from torch import nn

from models import NORMS
from models.networks.vision_transformer import VisionTransformer
from models.recompute import blocks_of, is_recomputing, recompute_in_backward
from models.trial_batch import check_recomputes

SMALL = ["cnn", "inception", "resnet", "wide_resnet", "recurrent", "vit"]
IMAGENET = list(small_imagenet.NARROW)


def make(kind, norm="batch", **changes):
    if kind in IMAGENET:
        return small_imagenet.make(kind, norm, **changes), small_imagenet.images(4)
    random = torch.Generator().manual_seed(0)
    return make_small(kind, norm, **changes), torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=random)


def steps(model, images, count=2, autocast=False):
    """Losses, gradients of each step, and the buffers after the last."""
    found = []
    torch.manual_seed(3)  # dropout
    for _ in range(count):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(images)
        loss = logits.float().square().sum()
        loss.backward()
        found += [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 1e-3 * parameter.grad
    return found + [buffer.clone() for buffer in model.buffers()]


def assert_same(kind, norm="batch", autocast=False, **changes):
    (plain, images), (again, _) = make(kind, norm, **changes), make(kind, norm, **changes)
    names = recompute_in_backward(again[1])
    assert list(plain.state_dict()) == list(again.state_dict())
    for one, other in zip(
        steps(plain, images, autocast=autocast), steps(again, images, autocast=autocast), strict=True
    ):
        assert torch.equal(one, other)
    return names


@pytest.mark.parametrize("kind", SMALL + IMAGENET)
def test_gradients_and_buffers_are_the_same_bits(kind):
    assert len(assert_same(kind)) >= (2 if kind != "recurrent" else 1)


@pytest.mark.parametrize("norm", sorted(set(NORMS) - {"batch"}))
def test_every_norm_is_computed_again_as_it_was(norm):
    """Batch renormalization and power norm train with their running statistics; power norm's backward pass has one."""
    assert_same("resnet", norm, norm_groups=2, norm_warmup_steps=1)


def test_lanes_and_bfloat16():
    assert_same("resnet", norm_statistics="lane", autocast=True)
    (plain, images), (again, _) = (make("resnet", norm_statistics="lane") for _ in range(2))
    recompute_in_backward(again[1])
    for model in (plain, again):
        for module in model.modules():
            if hasattr(module, "lanes"):
                module.lanes = 2
    assert all(torch.equal(*pair) for pair in zip(steps(plain, images), steps(again, images), strict=True))


def test_the_blocks_of_networks():
    names = {
        kind: [block.name for block in blocks_of(make(kind)[0][1])] for kind in ("resnet", "bottleneck", "vgg", "cnn")
    }
    assert names["resnet"][:3] == ["stem.0-2", "blocks.0", "blocks.1"]
    assert names["bottleneck"] == ["layer1.0", "layer1.1", "layer2.0", "layer3.0", "layer4.0"]
    assert names["vgg"][:2] == ["features.0-3", "features.4-6"]
    assert names["vgg"][-1] == "classifier.6-6"
    assert names["cnn"][0] == "features.0-3"


def saved_bytes(model, images):
    """Bytes that autograd keeps between the two passes, each tensor once; parameters are not counted."""
    kept = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in kept:
            sizes[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, so that no other has its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(images)
    return sum(size for size, _ in sizes.values())


@pytest.mark.parametrize(("kind", "most"), [("bottleneck", 0.5), ("basic", 0.75), ("convnext", 0.4), ("vgg", 0.6)])
def test_less_is_kept(kind, most):
    (plain, images), (again, _) = make(kind), make(kind)
    recompute_in_backward(again[1])
    assert saved_bytes(again, images) < most * saved_bytes(plain, images)


def test_nothing_is_computed_twice_without_a_backward_pass():
    model, images = make("resnet")
    recompute_in_backward(model[1])
    calls = []
    model[1].blocks[0].conv1.register_forward_hook(lambda *_: calls.append(is_recomputing()))
    with torch.no_grad():
        model(images)
    model.eval()(images).sum().backward()
    assert calls == [False, False]
    model.train()(images).sum().backward()
    assert calls[2:] == [False, True]
    assert not is_recomputing()


class Blocks(nn.Module):
    """A user's network: a list of blocks that take and give two tensors, with dropout and torch's batch norm."""

    def __init__(self, changes_itself=False):
        super().__init__()
        self.blocks = nn.ModuleList(Two(changes_itself) for _ in range(2))
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        a, b = x.mean(3), x.amax(3)
        for block in self.blocks:
            a, b = block(a, other=b)
        return self.last((a + b).mean(2))


class Two(nn.Module):
    def __init__(self, changes_itself):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4), nn.Dropout(0.4)
        self.calls = 0 if changes_itself else None

    def forward(self, a, *, other):
        if self.calls is not None:
            self.calls += 1
        return self.drop(self.norm(self.conv(a * (self.calls or 1)))), other + a


def wrapped(network):
    return nn.Sequential(nn.Identity(), network)


def test_any_module_is_computed_again():
    x, found = torch.randn(6, 4, 5, 7, generator=torch.Generator().manual_seed(0)), []
    for again in (False, True):
        torch.manual_seed(0)
        network = Blocks()
        if again:
            assert recompute_in_backward(network) == ["blocks.0", "blocks.1"]
        found.append(steps(network, x, count=3))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_what_cannot_be_computed_again_is_said_before_a_training():
    """A network whose blocks count their calls somewhere else than in buffers; one without blocks."""
    with pytest.raises(ValueError, match="finds no blocks in this network"):
        recompute_in_backward(nn.Linear(3, 3))
    shape = {"image_shape": (4, 5, 7), "num_classes": 3}
    check_recomputes("mine:net", Floats(Blocks()), **shape)
    with pytest.raises(ValueError, match=r"model\.network mine:net: train\.gradient_checkpointing changes .*conv"):
        check_recomputes("mine:net", Floats(Blocks(changes_itself=True)), **shape)
    with pytest.raises(ValueError, match=r"mine:net: train\.gradient_checkpointing: .*finds no blocks"):
        check_recomputes("mine:net", Floats(nn.Sequential()), **shape)


class Floats(nn.Sequential):
    """As `build_model` returns networks: something before, and the network."""

    def __init__(self, network):
        super().__init__(nn.Identity(), network)

    def forward(self, images):
        return self[1](images.float() / 255)


def test_an_error_in_a_block_leaves_buffers_as_they_were():
    model, images = make("resnet")
    recompute_in_backward(model[1])
    loss = model(images).sum()
    before = [buffer.clone() for buffer in model.buffers()]
    model[1].blocks[1].conv1.register_forward_pre_hook(lambda *_: 1 / 0)
    with contextlib.suppress(ZeroDivisionError):
        loss.backward()
        pytest.fail("the hook was not called")
    assert not is_recomputing()
    assert all(torch.equal(*pair) for pair in zip(before, model.buffers(), strict=True))


def test_a_vision_transformer_has_one_block_for_each_of_its_layers():
    model, _ = make("vit")
    assert isinstance(model[1], VisionTransformer)
    assert [block.name for block in blocks_of(model[1])] == [
        f"blocks.{number}" for number in range(len(model[1].blocks))
    ]
