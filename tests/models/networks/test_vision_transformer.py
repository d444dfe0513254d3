"""The vision transformer's block and tokens against numpy, in float64."""

import math

import numpy as np
import pytest
import torch
from small_networks import make, number, randomized, settings_of

from models.networks.vision_transformer import Block
from models.norms.registry import make_norm


def block_in_numpy(block, x, pre):
    def linear(layer, x):
        return x @ number(layer.weight).T + (0 if layer.bias is None else number(layer.bias))

    def norm(layer, x):
        normal = (x - x.mean(2, keepdims=True)) / np.sqrt(x.var(2, keepdims=True) + 1e-5)
        return normal * number(layer.norm.weight) + number(layer.norm.bias)

    def attend(x):
        heads = []
        query, key, value = np.split(linear(block.attention.qkv, x), 3, axis=2)
        for part in (slice(0, 4), slice(4, 8)):
            scores = np.exp(query[..., part] @ key[..., part].transpose(0, 2, 1) / math.sqrt(4))
            heads.append(scores / scores.sum(2, keepdims=True) @ value[..., part])
        return linear(block.attention.project, np.concatenate(heads, 2))

    def perceive(x):
        x = linear(block.mlp[0], x)
        return linear(block.mlp[2], x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))) / 2)

    for layer, branch in ((block.norm1, attend), (block.norm2, perceive)):
        x = x + branch(norm(layer, x)) if pre else norm(layer, x + branch(x))
    return x


@pytest.mark.parametrize("place", ["pre", "post"])
def test_block_of_the_vision_transformer(place):
    settings = settings_of("vit", "layer", norm_place=place)
    block = randomized(Block(settings, make_norm(settings)))
    x = np.random.default_rng(2).normal(size=(2, 6, 8))
    np.testing.assert_allclose(
        number(block(torch.from_numpy(x))), block_in_numpy(block, x, place == "pre"), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("norm", ["layer", "batch"])
@pytest.mark.parametrize("place", ["pre", "post"])
def test_gradient_of_a_block_of_the_vision_transformer(place, norm):
    settings = settings_of("vit", norm, norm_place=place, width=4)
    block = randomized(Block(settings, make_norm(settings)))
    x = torch.from_numpy(np.random.default_rng(3).normal(size=(2, 3, 4))).requires_grad_()
    torch.autograd.gradcheck(lambda x, *_: block(x), (x, *block.parameters()))


def test_tokens_of_the_vision_transformer_are_patches_in_reading_order():
    model = randomized(make("vit", "none")[1])
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    weight, seen = number(model.patches.weight), []
    model.blocks.register_forward_pre_hook(lambda _, args: seen.append(number(args[0])))
    model(x)
    for place, (row, column) in enumerate([(0, 0), (0, 4), (4, 0), (4, 4)]):
        patch = number(x)[:, :, row : row + 4, column : column + 4]
        token = np.einsum("nchw,dchw->nd", patch, weight) + number(model.patches.bias)
        np.testing.assert_allclose(seen[0][:, place], token + number(model.positions.weight)[place], rtol=0, atol=1e-10)
