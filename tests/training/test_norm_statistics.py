"""Statistics of norms over ranks: synchronized, by lane, joined for evaluation, and precise. Real gloo groups."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import nn

from models import build_model
from models.norms.registry import NORMS, make_norm
from pipeline.config.augment import AugmentSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.distributed.worker import alone
from pipeline.training import checkpoint, norm_statistics
from pipeline.training.assembly import assemble
from pipeline.training.job import Job, identity
from pipeline.training.loop import fit

pytestmark = pytest.mark.long

RUNNING = sorted(name for name in NORMS if make_norm(ModelSettings(norm=name)).keeps_statistics)


def as_whole(split, seed=0):
    """A batch norm in float64 and rows for it, cut into the parts that ranks have, with the gradient of the output."""
    layer = make_norm(ModelSettings(norm="batch", norm_statistics="world", norm_momentum=0.3)).layer(3).double()
    random = np.random.default_rng(seed)
    for parameter in layer.parameters():
        parameter.data.copy_(torch.from_numpy(random.normal(size=3)))
    shape = (sum(split), 3, 4, 4) if seed == 0 else (sum(split), 3)
    x, grad = (torch.from_numpy(random.normal(3, 2, size=shape)) for _ in range(2))
    return layer, x.split(list(split)), grad.split(list(split))


def synchronized(worker, split, seed):
    layer, x, grad = as_whole(split, seed)
    norm_statistics.connect(layer, worker, lanes=1)
    x = x[worker.rank].clone().requires_grad_()
    y = layer(x)
    y.backward(grad[worker.rank])
    weights = [worker.all_reduce_sum(parameter.grad.clone()) for parameter in layer.parameters()]
    return [t.detach().numpy() for t in (y, x.grad, layer.running_mean, layer.running_var, *weights)]


@pytest.mark.parametrize(
    ("split", "seed"),
    [((4, 4), 0), ((3, 3, 3, 3), 0), ((1, 6), 0), ((5, 1, 2, 4), 0), ((1, 1), 1), ((1, 1, 1, 1), 1), ((0, 3), 1)],
)
def test_synchronized_batch_norm_is_that_of_the_whole_batch(split, seed):
    """Even and uneven batches, one sample a rank with a single position, and a rank without rows."""
    layer, x, grad = as_whole(split, seed)
    x = torch.cat(x).requires_grad_()
    y = layer(x)
    y.backward(torch.cat(grad))
    found = run_ranks(synchronized, len(split), split, seed)
    np.testing.assert_allclose(np.concatenate([rank[0] for rank in found]), y.detach(), rtol=0, atol=1e-10)
    np.testing.assert_allclose(np.concatenate([rank[1] for rank in found]), x.grad, rtol=0, atol=1e-10)
    for rank in found:
        for mine, whole in zip(rank[2:], (layer.running_mean, layer.running_var, layer.weight.grad, layer.bias.grad),
                               strict=True):  # fmt: skip
            np.testing.assert_allclose(mine, whole.numpy(), rtol=0, atol=1e-10)


def test_synchronized_batch_norm_in_a_channels_last_network():
    """A world of two that is one: the sum over ranks doubles, as if another rank had the same rows."""
    plain, doubled = (
        build_model(
            ModelSettings(depth=3, width=4, norm="batch", norm_statistics=statistics),
            image_shape=(1, 12, 12),
            num_classes=3,
        ).to(memory_format=torch.channels_last)
        for statistics in ("rank", "world")
    )
    for layer in norm_statistics.layers(doubled).values():
        layer.sum_over_ranks = lambda values: values.mul_(2)
    images = torch.randint(0, 256, (6, 1, 12, 12), dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    for model in (plain, doubled):
        model(images).square().sum().backward()
    for mine, theirs in zip(doubled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


def make_job(dataset, folder, epochs=2, model=None, **changes):
    settings = {"epochs": epochs, "batch_size": 32, "lanes": 4, "evaluations_per_epoch": 2,
                "augment": AugmentSettings(flip=True)}  # fmt: skip
    model = {"depth": 3, "width": 4, "norm": "batch", "norm_groups": 2, **(model or {})}
    return Job(dataset, str(folder), ModelSettings(**model), TrainSettings(**{**settings, **changes}))


def fit_in_float64(worker, job):
    """Losses of all steps, and of evaluations."""
    losses = []

    def note(moment):
        if moment.name == "network_built":
            moment.model.double()
        elif moment.name == "after_step":
            losses.append(moment.loss)

    result = fit(worker, replace(job, hook=note))
    return losses, [point.loss for point in result.curve]


@pytest.mark.parametrize("statistics", ["lane", "world"])
def test_any_number_of_workers_has_the_same_loss_curve(dataset, tmp_path, statistics):
    """Lane by lane, or over the world, a step does not depend on how many workers share it; nor does evaluation."""
    curves = {}
    for count in (1, 2, 4):
        job = make_job(dataset, tmp_path / str(count), model={"norm_statistics": statistics})
        curves[count], evaluated = run_ranks(fit_in_float64, count, job)[0]
        assert len(curves[count]) == 50
        np.testing.assert_allclose(curves[count], curves[1], rtol=1e-9)
        if count == 1:
            alone_evaluated = evaluated
        np.testing.assert_allclose(evaluated, alone_evaluated, rtol=1e-9)
    job = make_job(dataset, tmp_path / "rank")
    by_rank, _ = run_ranks(fit_in_float64, 2, job)[0]
    assert not np.allclose(by_rank, curves[1], rtol=1e-3)  # the statistics of a rank are another network


def biased(worker, how):
    """Running statistics after each rank has seen other data, as from shards that were not shuffled."""
    layer = (
        make_norm(ModelSettings(norm="batch", norm_momentum=0.5, norm_scale="off", norm_shift="off")).layer(2).double()
    )
    random = np.random.default_rng(7 + worker.rank)
    for _ in range(30):
        layer(torch.from_numpy(random.normal(4 * worker.rank, 1 + worker.rank, size=(500, 2))))
    model = nn.Sequential(layer)
    if how == "joined":
        norm_statistics.of_all_ranks(worker, model, 500)
    if how == "precise":
        batches = (torch.from_numpy(random.normal(4 * worker.rank, 1 + worker.rank, size=(500, 2))) for _ in range(30))
        norm_statistics.precise(worker, model, batches)
    return layer.running_mean.numpy(), layer.running_var.numpy()


def test_the_statistics_of_rank_0_alone_are_wrong_and_ours_are_right():
    """Two ranks, N(0, 1) and N(4, 4): together mean 2, variance (1 + 4) / 2 + 4 by the law of total variance; a mean of
    variances would be 2.5."""
    (mean, var), _ = run_ranks(biased, 2, "rank 0")
    assert np.all(np.abs(mean - 2) > 1.8)
    assert np.all(np.abs(var - 6.5) > 5)
    for how in ("joined", "precise"):
        for mean, var in run_ranks(biased, 2, how):
            np.testing.assert_allclose(mean, 2, atol=0.1)
            np.testing.assert_allclose(var, 6.5, atol=0.3)


def test_ranks_count_by_their_rows():
    layer = make_norm(ModelSettings(norm="batch")).layer(1).double()
    few, many = np.array([0.0, 1.0]), np.array([4.0, 5.0, 9.0, 11.0, 2.0, 2.0])
    ranks = [
        {"running_mean": torch.tensor([rows.mean()]), "running_var": torch.tensor([rows.var()])} for rows in (few, many)
    ]
    joint = norm_statistics.join(layer, ranks, [len(few), len(many)])
    everything = np.concatenate([few, many])
    assert joint["running_mean"].item() == pytest.approx(everything.mean(), rel=1e-12)
    assert joint["running_var"].item() == pytest.approx(everything.var(), rel=1e-12)


def precisely(worker, parts):
    torch.manual_seed(3)
    model = nn.Sequential(make_norm(ModelSettings(norm="batch")).layer(2), nn.Dropout(0.5)).double()
    norm_statistics.precise(worker, model, [torch.from_numpy(part) for part in np.split(parts[worker.rank], 4)])
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())
    return model[0].running_mean.numpy(), model[0].running_var.numpy()


@pytest.mark.parametrize("world_size", [1, 2])
def test_precise_statistics_are_those_of_all_rows(world_size):
    rows = np.random.default_rng(0).normal(5, 3, size=(40, 2, 3, 3))
    for mean, var in run_ranks(precisely, world_size, np.split(rows, world_size)):
        np.testing.assert_allclose(mean, rows.mean((0, 2, 3)), rtol=1e-12)
        np.testing.assert_allclose(var, rows.transpose(0, 2, 3, 1).reshape(-1, 2).var(0, ddof=1), rtol=1e-12)


def test_a_network_without_running_statistics_needs_no_batches_to_be_precise():
    model = build_model(ModelSettings(depth=3, width=4, norm="layer"), image_shape=(1, 8, 8), num_classes=3)
    norm_statistics.precise(alone("cpu"), model, (pytest.fail("a batch was read") for _ in range(3)))


def state_of(job):
    return checkpoint.load_newest(f"{job.folder}/checkpoints", identity=identity(job), device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("norm", RUNNING)
def test_evaluation_leaves_the_training_as_it_was(dataset, tmp_path, norm, world_size):
    """Also of norms whose training depends on running statistics: as many bits for one evaluation as for four."""
    model = {"norm": norm, "norm_warmup_steps": 5}
    jobs = [
        make_job(dataset, tmp_path / name, 1, model, **changes)
        for name, changes in (
            ("few", {"evaluations_per_epoch": 1}),
            ("many", {"evaluations_per_epoch": 4, "evaluation_statistics": "precise", "precise_batches": 3}),
        )
    ]
    for job in jobs:
        run_ranks(fit, world_size, job)
    few, many = map(state_of, jobs)
    with assemble(alone("cpu"), jobs[0]) as training:
        parameters = dict(training.state.model.named_parameters())
    assert all(torch.equal(few["model"][name], many["model"][name]) for name in parameters)
    for mine, theirs in zip(few["ranks"], many["ranks"], strict=True):
        assert all(torch.equal(mine["buffers"][name], theirs["buffers"][name]) for name in mine["buffers"])
    # The two were judged with other statistics, and these are what is kept.
    running = [name for name in few["model"] if "running_" in name and "nu" not in name]
    assert not any(torch.equal(few["model"][name], many["model"][name]) for name in running)


def evaluated_again(worker, job):
    """The loss of the kept network, as somebody who loads it finds it."""
    with assemble(worker, job) as training:
        training.state.model.load_state_dict(state_of(job)["model"])
        return training.evaluator.measure().loss


@pytest.mark.parametrize("changes", [{}, {"evaluation_statistics": "precise"}, {"weight_ema": 0.9}])
def test_the_kept_network_is_the_one_that_was_judged(dataset, tmp_path, changes):
    job = make_job(dataset, tmp_path, **changes)
    result = run_ranks(fit, 2, job)[0]
    assert evaluated_again(alone("cpu"), job) == pytest.approx(result.curve[-1].loss, rel=1e-6)
