import random

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_diagnostics import hooks_of, make, mean_loss
from torch import nn

from models import build_model
from models.norms.batch import BatchNorm
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.distributed.gradients import GradientExchange
from pipeline.telemetry.events import metric_values
from pipeline.training import norm_statistics
from pipeline.training.diagnostics import MULTIPLES
from pipeline.training.optimizer import make_optimizer


@pytest.fixture(autouse=True)
def one_thread():
    """Networks as small as these are the slower the more threads compute them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def nodes_of(loss):
    """How many nodes the autograd graph has."""
    seen, ahead = set(), [loss.grad_fn]
    while ahead:
        node = ahead.pop()
        if node is not None and node not in seen:
            seen.add(node)
            ahead += [following for following, _ in node.next_functions]
    return len(seen)


class Whim(nn.Module):
    """Draws from each generator that a network may draw from, and drops units."""

    def forward(self, x):
        if not self.training:
            return x
        return nn.functional.dropout(x, 0.2) * (1 + 0.1 * random.random()) * (1 + 0.1 * np.random.rand())


def train(worker, norm, statistics, diagnostics, steps=10):
    """All that a training is, after some steps, and what was told meanwhile."""
    torch.manual_seed(worker.rank)
    np.random.seed(worker.rank)
    random.seed(worker.rank)
    settings = ModelSettings(width=4, norm=norm, norm_groups=2, norm_warmup_steps=3, norm_statistics=statistics)
    model = build_model(settings, image_shape=(1, 8, 8), num_classes=3)
    model.append(Whim()).train()
    norm_statistics.connect(model, worker, lanes=2)
    exchange, options = GradientExchange(worker, model, "none"), TrainSettings(learning_rate=0.02)
    optimizer = make_optimizer(model, options)
    seer, told = make(model, worker, **diagnostics)
    data, nodes = torch.Generator().manual_seed(worker.rank + 1), set()
    for step in range(steps):
        images = torch.randint(0, 256, (8, 1, 8, 8), generator=data, dtype=torch.uint8)
        labels = torch.randint(0, 3, (8,), generator=data)
        parts = list(zip(images.chunk(2), labels.chunk(2), strict=True))
        optimizer.zero_grad(set_to_none=True)
        for number, (part, of_part) in enumerate(parts):
            loss = mean_loss(part, of_part, exchange.forward) / 2
            nodes.add(nodes_of(loss))
            with exchange.local() if number == 0 else torch.enable_grad():
                loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters()]
        if seer.is_due(step):
            seer.observe(step, 0.02, parts)
        assert all(map(torch.equal, gradients, [parameter.grad for parameter in model.parameters()]))
        optimizer.step()
        with seer.evaluation(step + 1), torch.inference_mode():
            model.eval()
            model.forward(images)
            model.train()
    state = [*model.state_dict().values(), *(s["momentum_buffer"] for s in optimizer.state_dict()["state"].values())]
    draws = [torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()]
    return [value.tolist() for value in state], draws, nodes, hooks_of(model), list(told)


def train_twice(worker, norm, statistics):
    """Without looking and with it."""
    looking = {"every_steps": 2, "smoothness": True}
    return [train(worker, norm, statistics, settings) for settings in ({"every_steps": None}, looking)]


@pytest.mark.parametrize(
    ("norm", "statistics", "world_size"),
    [("batch", "rank", 1), ("batch", "lane", 1), ("batch", "world", 2), ("batch_renorm", "rank", 2),
     ("power", "rank", 1), ("switchable", "rank", 1), ("none", "rank", 1)],
)  # fmt: skip
def test_looking_changes_nothing_bit_for_bit(norm, statistics, world_size):
    both = run_ranks(train_twice, world_size, norm, statistics)
    for (*state, hooks, told), (*state_looking, hooks_looking, told_looking) in both:
        assert state == state_looking  # weights, statistics and counters, momentum, random numbers, autograd nodes
        assert hooks == hooks_looking == 0
        assert told == []
        assert [event["step"] for event in told_looking if "smoothness/loss" in event["values"]] == [1, 3, 5, 7, 9]
        assert all(None not in event["values"].values() for event in told_looking)
    values = [[event["values"] for event in looking[-1]] for _, looking in both]
    assert all(rank == values[0] for rank in values)


def test_nothing_is_done_where_they_are_off(monkeypatch):
    model = nn.Sequential(nn.Linear(3, 4), BatchNorm(4), nn.ReLU())
    seer, told = make(model, every_steps=None)
    for name in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        monkeypatch.setattr(nn.Module, name, None)  # a call raises
    assert not any(seer.is_due(step) for step in range(100))
    with seer.evaluation(1):
        model(torch.randn(5, 3))
    assert hooks_of(model) == 0
    assert told == []


def test_it_is_due_at_the_first_step_and_every_so_many():
    seer, _ = make(nn.Linear(1, 1), every_steps=3)
    assert [step for step in range(10) if seer.is_due(step)] == [0, 3, 6, 9]


def quadratic(curvature, forward):
    weights = forward(None)
    return 0.5 * weights @ curvature @ weights


class Point(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(start, dtype=torch.float64))

    def forward(self, _):
        return self.weights


CURVATURES = torch.tensor([[[5.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)


def look_at_a_quadratic(worker, start, learning_rate, curvatures):
    model = Point(start)
    seer, told = make(model, worker, smoothness=True, loss=lambda a, _, forward: quadratic(a, forward))
    seer.observe(0, learning_rate, [(curvatures[worker.rank], None)])
    assert model.weights.tolist() == start
    assert model.weights.grad is None
    return told[0]["values"]


@pytest.mark.parametrize("world_size", [1, 2])
def test_smoothness_of_a_quadratic(world_size):
    """Of the mean over ranks of losses whose curvature is known: beta = |A g| / |g|."""
    start, rate = [1.0, -2.0], 0.05
    a, w = CURVATURES[:world_size].mean(0).numpy(), np.array(start)
    g = a @ w
    for values in run_ranks(look_at_a_quadratic, world_size, start, rate, CURVATURES):
        assert values["smoothness/loss"] == pytest.approx(0.5 * w @ a @ w)
        assert values["smoothness/beta"] == pytest.approx(np.linalg.norm(a @ g) / np.linalg.norm(g))
        for multiple in MULTIPLES:
            there = w - multiple * rate * g
            assert values[f"smoothness/loss_at_{multiple:g}"] == pytest.approx(0.5 * there @ a @ there)
            change = np.linalg.norm(a @ there - g)
            assert values[f"smoothness/gradient_change_at_{multiple:g}"] == pytest.approx(change)


def test_beta_is_the_largest_curvature_where_the_gradient_points_along_it():
    values, vectors = np.linalg.eigh(CURVATURES[0].numpy())
    (found,) = run_ranks(look_at_a_quadratic, 1, vectors[:, -1].tolist(), 0.1, CURVATURES)
    assert found["smoothness/beta"] == pytest.approx(values[-1])


def test_what_is_not_finite_is_none():
    (values,) = run_ranks(look_at_a_quadratic, 1, [1.0, -2.0], 1e200, CURVATURES)
    assert values["smoothness/loss_at_4"] is None
    assert values["smoothness/loss"] == pytest.approx(4.5)


def test_metrics():
    event = {"kind": "diagnostics", "time": 1.0, "step": 3, "seconds": 0.1, "values": {"dead_units/1.2": 0.5}}
    assert metric_values(event) == {"diagnostics/dead_units/1.2": 0.5}
