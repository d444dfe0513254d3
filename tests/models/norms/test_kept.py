"""torch's own batch norm in a network of one's own: the same numbers, and statistics that ranks can join."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from models.fold import fold
from models.norms.base import RunningNorm
from models.norms.kept import join_statistics_of_torch
from pipeline.training import norm_statistics


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4), nn.BatchNorm1d(4))


def test_it_computes_as_before():
    plain, kept = network(), network()
    names = list(plain.state_dict())
    assert join_statistics_of_torch(kept) == []
    assert list(kept.state_dict()) == names
    images = torch.randn(5, 2, 6, 6)
    for mode in (True, False):
        assert torch.equal(plain.train(mode)(images), kept.train(mode)(images))
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in plain.state_dict().items())
    assert all(isinstance(copy.deepcopy(kept)[at], RunningNorm) for at in (1, 4))


def test_statistics_of_two_ranks_are_those_of_all_their_rows():
    random = np.random.default_rng(0)
    rows = random.normal(size=(2, 50, 3, 4, 4)) * [[[[[2.0]], [[1.0]], [[3.0]]]]]
    ranks = []
    for part in rows:
        layer = nn.Sequential(nn.BatchNorm2d(3, momentum=1.0)).double()
        join_statistics_of_torch(layer)
        layer(torch.from_numpy(part))
        ranks.append(dict(layer.named_buffers()))
    joint = norm_statistics.join(layer, ranks, [50, 50])
    whole = np.concatenate(rows).swapaxes(0, 1).reshape(3, -1)
    np.testing.assert_allclose(joint["0.running_mean"], whole.mean(1))
    np.testing.assert_allclose(joint["0.running_var"], whole.var(1, ddof=1), rtol=2e-3)  # each rank's is unbiased


def test_its_state_is_loaded_with_its_count_of_batches():
    one, other = network(), network()
    for model in (one, other):
        join_statistics_of_torch(model)
    one(torch.randn(5, 2, 6, 6))
    other.load_state_dict(one.state_dict())
    for name, value in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


def test_it_is_folded():
    model = network()
    join_statistics_of_torch(model)
    images = torch.randn(5, 2, 6, 6)
    model(images)
    folded = fold(model)
    assert folded.folded == ("1", "4")
    torch.testing.assert_close(folded.model(images), model.eval()(images))


class Whitening(nn.Module):
    """A layer of one's own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))


@pytest.mark.parametrize("layer", [nn.InstanceNorm2d(3, track_running_stats=True), Whitening()])
def test_other_layers_with_running_statistics_are_named(layer):
    model = nn.Sequential(layer, nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3))
    assert join_statistics_of_torch(model) == ["0"]
    assert type(model[0]) is type(layer)


def test_statistics_that_ranks_share_anyway_are_not_named():
    model = nn.Sequential(nn.SyncBatchNorm(3))
    assert join_statistics_of_torch(model) == []
    assert type(model[0]) is nn.SyncBatchNorm
