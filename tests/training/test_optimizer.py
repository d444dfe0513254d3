"""Learning rate and momentum by step, and what decays."""

import copy
import math

import pytest
import torch
from torch import nn

from pipeline.config.training import TrainSettings
from pipeline.training.layerwise import LAMB, LARS
from pipeline.training.optimizer import Schedule, load_optimizer, make_optimizer, set_rates


def rates(steps=100, **train):
    """Learning rate of each step of one epoch."""
    given = {"epochs": 1, "batch_size": 256, "learning_rate": 1.0, "warmup_epochs": 0.1}
    schedule = Schedule(TrainSettings(**{**given, **train}), steps)
    return [schedule.learning_rate(step) for step in range(steps)]


def test_cosine_after_linear_warm_up():
    found = rates()
    assert found[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])
    assert found[10] == 1
    assert found[55] == pytest.approx(0.5)
    assert found[99] == pytest.approx(0.5 * (1 + math.cos(math.pi * 89 / 90)))
    assert rates(10, warmup_epochs=0)[0] == 1


def test_linear_and_constant():
    assert rates(schedule="linear", warmup_epochs=0) == pytest.approx([1 - s / 100 for s in range(100)])
    assert rates(schedule="constant")[10:] == [1.0] * 90
    assert rates(schedule="constant")[4] == 0.5


def test_linear_scaling_warms_up_from_the_unscaled_rate():
    """Goyal et al. 2017, section 2.2: from eta to k eta, by the same amount at every step."""
    found = rates(learning_rate=0.1, batch_size=1024, base_batch_size=256, schedule="constant")
    assert found[10:] == pytest.approx([0.4] * 90)
    assert found[:10] == pytest.approx([0.1 + 0.3 * (s + 1) / 10 for s in range(10)])
    small = rates(learning_rate=0.1, batch_size=128, base_batch_size=256, schedule="constant")
    assert small[10:] == pytest.approx([0.05] * 90)
    assert small[0] == pytest.approx(0.005)


def test_one_cycle_is_torchs():
    """torch's own schedule, with its two phases, is an independent account of the same one."""
    train = TrainSettings(epochs=1, batch_size=256, learning_rate=0.7, schedule="one_cycle", momentum=0.95)
    schedule = Schedule(train, 50)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.7, momentum=0.95)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.7, total_steps=51, pct_start=0.3, base_momentum=0.85, max_momentum=0.95, final_div_factor=1e4
    )
    for step in range(50):
        group = optimizer.param_groups[0]
        assert schedule.learning_rate(step) == pytest.approx(group["lr"], abs=0.03)
        assert schedule.momentum(step) == pytest.approx(group["momentum"], abs=0.007)
        optimizer.step()
        theirs.step()
    assert schedule.learning_rate(0) == pytest.approx(0.7 / 25)
    assert schedule.learning_rate(15) == pytest.approx(0.7)
    assert schedule.momentum(15) == pytest.approx(0.85)
    assert schedule.learning_rate(49) == pytest.approx(0.7 / 2.5e5)
    assert schedule.momentum(49) == pytest.approx(0.95)


def test_vectors_do_not_decay():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    decayed, kept = make_optimizer(model, TrainSettings(weight_decay=0.5)).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.5, 0)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in kept["params"]] == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("name", "kind"), [("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW), ("lars", LARS), ("lamb", LAMB)]
)
def test_every_optimizer_leaves_vectors_without_decay_and_trust(name, kind):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    optimizer = make_optimizer(model, TrainSettings(optimizer=name, weight_decay=0.5))
    assert type(optimizer) is kind
    assert [(g["weight_decay"], {p.ndim > 1 for p in g["params"]}) for g in optimizer.param_groups] == [
        (0.5, {True}), (0.0, {False}),
    ]  # fmt: skip
    assert [group.get("trust") for group in optimizer.param_groups] == {
        "lars": [True, False],
        "lamb": [True, False],
    }.get(name, [None, None])


@pytest.mark.parametrize(("name", "eps"), [("adamw", 1e-8), ("lamb", 1e-6)])
def test_momentum_is_beta1_of_adams_kind(name, eps):
    """So that one_cycle cycles it, too."""
    optimizer = make_optimizer(nn.Linear(2, 2), TrainSettings(optimizer=name, momentum=0.8, beta2=0.99))
    assert all((g["betas"], g["eps"]) == ((0.8, 0.99), eps) for g in optimizer.param_groups)
    set_rates(optimizer, 0.3, 0.7)
    assert all((g["lr"], g["betas"]) == (0.3, (0.7, 0.99)) for g in optimizer.param_groups)
    given = make_optimizer(nn.Linear(2, 2), TrainSettings(optimizer=name, optimizer_eps=0.1))
    assert {group["eps"] for group in given.param_groups} == {0.1}


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_a_head_has_a_rate_of_its_own_all_the_way(name):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    train = TrainSettings(optimizer=name, learning_rate=0.1, head_learning_rate=0.5)
    optimizer = make_optimizer(model, train, head={"1.weight", "1.bias"})
    set_rates(optimizer, 0.05, 0.9)  # half way through a schedule
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert [rates[id(p)] for p in model.parameters()] == pytest.approx([0.05, 0.05, 0.25, 0.25])
    other = make_optimizer(model, train, head={"1.weight", "1.bias"})
    load_optimizer(other, optimizer.state_dict())
    set_rates(other, 0.02, 0.9)
    assert [group["lr"] for group in other.param_groups] == pytest.approx([0.02, 0.02, 0.1, 0.1])


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb"])
def test_a_state_of_a_gpu_is_loaded_as_this_device_computes(name):
    """What one kernel has updated there is updated by others here; counts of steps come along."""
    model = nn.Linear(2, 2)
    twin = copy.deepcopy(model)
    optimizer, other = (make_optimizer(one, TrainSettings(optimizer=name)) for one in (model, twin))
    for parameter, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        parameter.grad, theirs.grad = torch.ones_like(parameter), torch.ones_like(parameter)
    optimizer.step()
    twin.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())
    load_optimizer(other, {**state, "param_groups": [{**g, "fused": True} for g in state["param_groups"]]})
    assert all(not group["fused"] for group in other.param_groups if name in ("sgd", "adamw"))
    other.step()
    optimizer.step()
    one, two = (each.state_dict()["state"] for each in (optimizer, other))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[n][key], two[n][key]) for n in one for key in one[n])
    assert all(map(torch.equal, model.parameters(), twin.parameters()))


@pytest.mark.parametrize(
    ("given", "workers", "rank", "total"),
    [({}, 4, 128, 512), ({"rank_batch_size": 32}, 2, 32, 64), ({"batch_size": 256}, 4, None, 256)],
)
def test_batch_of_a_worker_or_of_all(given, workers, rank, total):
    train = TrainSettings(**given).for_workers(workers)
    assert (train.rank_batch_size, train.global_batch) == (rank, total)
    assert train.for_workers(workers) == train


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"rank_batch_size": 64, "batch_size": 256}, "batch_size 256 is not rank_batch_size 64 x 2 workers: set one"),
        ({"rank_batch_size": 9}, "rank_batch_size 9 x 2 workers is not a multiple of lanes 16: use 8, or other lanes"),
    ],
)
def test_batches_that_do_not_fit(given, message):
    with pytest.raises(ValueError, match=message):
        TrainSettings(**given).for_workers(2)


def test_warm_restarts_are_whole_schedules_of_doubling_lengths():
    """SGDR with T_0 = 1.5 epochs of 20 steps and T_mult = 2: cycles of 30, 60 and 120 steps, and what is left."""
    train = TrainSettings(epochs=11, batch_size=256, learning_rate=1.0, warmup_epochs=1.0, first_cycle_epochs=1.5)
    schedule = Schedule(train, 20)
    assert schedule.cycle_ends == (30, 90, 210, 220)
    starts = (0, *schedule.cycle_ends[:-1])
    for start, end in zip(starts, schedule.cycle_ends, strict=True):
        steps, warmup = end - start, min(20, (end - start) // 2)  # so that the shortest reaches its peak
        found = [schedule.learning_rate(step) for step in range(start, end)]
        assert found[:warmup] == pytest.approx([(s + 1) / warmup for s in range(warmup)])
        assert found[warmup:] == pytest.approx(
            [0.5 * (1 + math.cos(math.pi * s / (steps - warmup))) for s in range(steps - warmup)]
        )


def test_each_cycle_of_one_cycle_rises_and_falls():
    train = TrainSettings(epochs=3, batch_size=256, learning_rate=1.0, schedule="one_cycle", first_cycle_epochs=1)
    schedule = Schedule(train, 100)
    alone = Schedule(TrainSettings(epochs=1, batch_size=256, learning_rate=1.0, schedule="one_cycle"), 100)
    assert schedule.cycle_ends == (100, 300)
    assert [schedule.learning_rate(s) for s in range(100)] == [alone.learning_rate(s) for s in range(100)]
    assert (schedule.learning_rate(100), schedule.momentum(100)) == (alone.learning_rate(0), alone.momentum(0))
    assert schedule.learning_rate(160) == 1.0  # 30% of 200 steps after the restart


def test_a_first_cycle_longer_than_the_training_is_refused():
    with pytest.raises(ValueError, match=r"first_cycle_epochs 2\.5 is more than epochs 2: use fewer, or null"):
        TrainSettings(epochs=2, first_cycle_epochs=2.5)
