"""Gradients within bounds: by the length of all, and by the lengths of each unit's weights."""

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.config.training import TrainSettings
from pipeline.training.clipping import make_clip


def network(scale=1.0):
    """A convolution, a bias, a norm and a linear layer, with gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2)).double()
    nn.init.normal_(model[1].weight)
    for parameter in model.parameters():
        parameter.grad = scale * torch.randn(parameter.shape, dtype=torch.float64)
    return model


def gradients(model):
    return {name: parameter.grad.numpy().copy() for name, parameter in model.named_parameters()}


def test_nothing_is_clipped_by_default():
    assert make_clip(network(), TrainSettings()) is None


@pytest.mark.parametrize(("scale", "clipped"), [(1.0, True), (1e-3, False)])
def test_clip_norm_bounds_the_length_of_all_together(scale, clipped):
    model = network(scale)
    before = gradients(model)
    make_clip(model, TrainSettings(clip_norm=0.5))()
    length = np.sqrt(sum((values**2).sum() for values in before.values()))
    assert (length > 0.5) == clipped
    factor = 0.5 / length if clipped else 1.0
    for name, values in gradients(model).items():
        np.testing.assert_allclose(values, factor * before[name], rtol=1e-5)


def test_clip_adaptive_is_the_papers():
    """Brock et al. 2021, equation 3, unit by unit; a vector is one unit; the head is left alone."""
    model = network()
    before = gradients(model)
    make_clip(model, TrainSettings(clip_adaptive=0.1), head={"3.weight", "3.bias"})()
    after = gradients(model)
    weights = {name: parameter.detach().numpy() for name, parameter in model.named_parameters()}
    for name, gradient in before.items():
        expected = gradient.copy()
        units = expected if gradient.ndim > 1 else expected[None]
        of_weights = weights[name] if gradient.ndim > 1 else weights[name][None]
        for unit, weight in zip(units, of_weights, strict=True):
            bound = 0.1 * max(np.linalg.norm(weight), 1e-3)
            length = np.linalg.norm(unit)
            if length > bound and not name.startswith("3."):
                unit *= bound / length
        np.testing.assert_allclose(after[name], expected, rtol=1e-12)
    assert not np.array_equal(after["0.weight"], before["0.weight"])
    assert np.array_equal(after["3.weight"], before["3.weight"])


def test_a_frozen_parameter_has_no_gradient_to_clip():
    model = network()
    model[0].requires_grad_(False)
    model[0].weight.grad = model[0].bias.grad = None
    for setting in ("clip_norm", "clip_adaptive"):
        make_clip(model, TrainSettings(**{setting: 0.1}))()
    assert model[0].weight.grad is None


def test_both_at_once_are_refused():
    with pytest.raises(ValueError, match=r"clip_norm 1 and clip_adaptive 0\.01 each bound the gradients: set one"):
        TrainSettings(clip_norm=1, clip_adaptive=0.01)
