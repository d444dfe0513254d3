import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_diagnostics import hooks_of, make
from torch import nn

from models import build_model
from models.norms.batch import BatchNorm
from models.norms.batch_renorm import BatchRenorm
from models.norms.power import PowerNorm
from pipeline.config.model import ModelSettings
from pipeline.distributed.worker import alone
from pipeline.training.layer_statistics import gradient_norms


def test_gradient_norms_are_those_of_a_layers_own_parameters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()), nn.Linear(2, 2))
    model[0].weight.grad = torch.tensor([[1.0, 2.0], [2.0, 0.0]])
    model[0].bias.grad = torch.tensor([4.0, 0.0])
    model[1][0].weight.grad = torch.tensor([[3.0, -4.0]])
    values = {name: float(value) for name, value in gradient_norms(model).items()}
    assert values == {"gradient_norm/0": 5.0, "gradient_norm/1.0": 5.0}


class Sequences(nn.Module):
    """A conv net and a token net, as simple as their activations can be looked at from outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv, self.first = nn.Conv2d(2, 3, 3).double(), nn.ReLU()
        self.linear, self.second, self.head = nn.Linear(4, 5).double(), nn.Tanh(), nn.Linear(5, 3).double()

    def inputs(self, x):
        """Of both nonlinearities: (N, 3, 4, 4) and (N, 12, 5)."""
        first = self.conv(x)
        return first, self.linear(first.relu().flatten(1, 2))

    def forward(self, x):
        x = self.first(self.conv(x))
        return self.head(self.second(self.linear(x.flatten(1, 2))).mean(1))


def data_of(step, rank=0, world_size=1, rows=12):
    generator = torch.Generator().manual_seed(step)
    images = torch.randn(rows, 2, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (rows,), generator=generator)
    return images.chunk(world_size)[rank], labels.chunk(world_size)[rank]


def look_twice(worker):
    model = Sequences()
    seer, told = make(model, worker)
    for step in range(2):
        images, labels = data_of(step, worker.rank, worker.world_size)
        seer.observe(step, 0.1, list(zip(images.chunk(3), labels.chunk(3), strict=True)))
        with torch.no_grad():
            model.conv.weight.mul_(1.5).add_(0.01)
    return [event["values"] for event in told]


def by_hand(step, scaled):
    model = Sequences()
    with torch.no_grad():
        if scaled:
            model.conv.weight.mul_(1.5).add_(0.01)
        first, second = model.inputs(data_of(step)[0])
    first, second = np.moveaxis(first.numpy(), 1, -1).reshape(-1, 3), second.numpy().reshape(-1, 5)
    return {"first": first, "second": second}


@pytest.mark.parametrize("world_size", [1, 2])
def test_activations_against_numpy(world_size):
    """The same for one rank and two, and for three parts of a batch."""
    ranks = run_ranks(look_twice, world_size)
    before, now = by_hand(0, False), by_hand(1, True)
    for values in ranks:
        assert not [name for name in values[0] if name.startswith(("activation_drift", "activation_variance_ratio"))]
        for layer in ("first", "second"):
            x, y = before[layer], now[layer]
            assert values[0][f"activation_mean/{layer}"] == pytest.approx(x.mean())
            assert values[1][f"activation_mean/{layer}"] == pytest.approx(y.mean())
            assert values[1][f"activation_variance/{layer}"] == pytest.approx(y.var(0).mean())
            drift = np.abs(y.mean(0) - x.mean(0)) / x.std(0)
            assert values[1][f"activation_drift/{layer}"] == pytest.approx(drift.mean())
            ratio = np.exp(np.log(y.var(0) / x.var(0)).mean())
            assert values[1][f"activation_variance_ratio/{layer}"] == pytest.approx(ratio)
        unit = np.split(now["second"][:, 0], world_size)
        for percent in (15, 50, 85):
            expected = np.mean([np.percentile(part, percent) for part in unit])
            assert values[1][f"input_percentile_{percent}/second"] == pytest.approx(expected)
        assert "input_percentile_50/first" not in values[1]
    assert ranks[0] == ranks[-1]


@pytest.mark.parametrize(
    ("activation", "dead", "alive"),
    [
        (nn.ReLU(), [-1.0, 0.0], [-1.0, 0.1]),
        (nn.ReLU(inplace=True), [-1.0, 0.0], [-1.0, 0.1]),
        (nn.Sigmoid(), [6.92, -6.92], [6.92, 6.90]),  # the derivative is 0.001 at 6.907
        (nn.Tanh(), [4.15, -4.15], [4.15, -4.14]),  # 4.147
        (nn.GELU(), [-4.5, -5.0], [-4.5, 5.0]),
        (nn.SiLU(), [-10.0, -9.9], [-10.0, -8.0]),
    ],
)
def test_dead_units_are_those_that_no_row_wakes(activation, dead, alive):
    """One of four channels lives in a single row."""
    model = nn.Sequential(nn.Identity(), activation)
    images = torch.tensor([dead * 2, dead * 2, dead * 2]).T.repeat(1, 2)[:, :4].contiguous()
    images[:2, 3] = torch.tensor(alive)
    seer, told = make(model)
    seer.observe(0, 0.1, [(images, torch.zeros(4, dtype=torch.int64))])
    assert told[0]["values"]["dead_units/1"] == 0.75


NORMS = [BatchNorm(3), BatchRenorm(3), PowerNorm(3)]


def population(norm, mean, variance):
    """The statistics of `RunningNorm.population`, by hand."""
    if isinstance(norm, PowerNorm):
        return 0 * mean, variance + mean**2 + norm.eps
    return mean, variance + norm.eps


def gap_of_rank(worker, kind):
    norm = NORMS[kind].double()
    running = [torch.tensor([0.5, -1.0, 2.0]), torch.tensor([1.5, 0.5, 4.0])]
    norm.set_population(*running)
    before = {name: value.clone() for name, value in norm.state_dict().items()}
    model = nn.Sequential(norm)
    seer, told = make(model, worker, evaluation_batches=2)
    with seer.evaluation(7), torch.inference_mode():
        model(torch.randn(4, 3).double())  # in training mode: precise statistics are computed so
        norm.load_state_dict(before)
        model.eval()
        for number in range(3 * (worker.rank == 0)):
            model(data_of(number)[0].flatten(2)[:, :1].expand(-1, 3, -1) * torch.tensor([1.0, 2.0, 3.0])[:, None] + 1)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())
    assert hooks_of(model) == 0
    return told


@pytest.mark.parametrize("kind", range(len(NORMS)))
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_gap_between_batch_and_running_statistics(kind, world_size):
    """Of the first two of three batches; a second rank has none, and counts for nothing."""
    norm, gaps = NORMS[kind], []
    mean, square = population(norm, np.array([0.5, -1.0, 2.0]), np.array([1.5, 0.5, 4.0]))
    for number in range(2):
        x = data_of(number)[0].flatten(2)[:, 0].numpy().ravel()[:, None] * np.array([1.0, 2.0, 3.0]) + 1
        mean_batch, square_batch = population(norm, x.mean(0), x.var(0, ddof=1))
        far = np.abs(mean_batch - mean) / np.sqrt(square)
        gaps.append([far.mean(), np.abs(np.log(square_batch / square)).mean()])
    expected = np.mean(gaps, axis=0)
    for told in run_ranks(gap_of_rank, world_size, kind):
        assert [(event["kind"], event["step"]) for event in told] == [("diagnostics", 7)]
        values = told[0]["values"]
        assert list(values) == ["statistics_gap_mean/0", "statistics_gap_variance/0"]
        assert list(values.values()) == pytest.approx(list(expected))


def test_an_error_in_an_evaluation_stays_the_error():
    model = nn.Sequential(BatchNorm(3))
    seer, told = make(model)
    with pytest.raises(RuntimeError, match="saw 3 rows"), seer.evaluation(1):
        raise RuntimeError("evaluation saw 3 rows")
    assert hooks_of(model) == 0
    assert told == []


def test_the_recurrent_cell_is_seen_over_all_its_steps():
    settings = ModelSettings(network="recurrent", norm="batch", width=4, depth=1)
    model = build_model(settings, image_shape=(1, 8, 8), num_classes=3)
    seer, told = make(model)
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    seer.observe(0, 0.1, [(images, torch.zeros(6, dtype=torch.int64))])
    names = [name for name in told[0]["values"] if name.startswith("dead_units/")]
    assert [name.rpartition(".")[2] for name in names] == ["forget", "admit", "candidate", "emit", "squash"]


class SharedActivation(nn.Module):
    """One activation module in two places, as networks of one's own often have it."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(4)
        self.act, self.conv, self.wider = nn.ReLU(), nn.Conv2d(2, 3, 3).double(), nn.Conv2d(3, 5, 3).double()
        self.head = nn.Linear(5, 3).double()

    def forward(self, x):
        return self.head(self.act(self.wider(self.act(self.conv(x)))).mean((2, 3)))


def test_places_of_one_activation_are_told_apart_by_their_channels():
    model = SharedActivation()
    seer, told = make(model, alone("cpu"))
    images, labels = data_of(0)
    seer.observe(0, 0.1, [(images, labels)])
    first = model.conv(images)
    second = model.wider(first.relu())
    values = told[0]["values"]
    assert values["activation_mean/act"] == pytest.approx(first.mean().item())
    assert values["activation_mean/act of 5 channels"] == pytest.approx(second.mean().item())
