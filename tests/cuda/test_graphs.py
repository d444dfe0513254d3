"""``train.cuda_graphs``: recorded steps are those that are launched one by one."""

from functools import partial

import pytest
import torch
from gpu_jobs import assert_same_end, make_job, newest, no_waiting
from ranks import fit_until

from pipeline.config.training import TrainSettings
from pipeline.distributed.worker import alone
from pipeline.training.assembly import assemble
from pipeline.training.loop import fit
from pipeline.training.word import Word

NETWORKS = {
    "batch": {},
    "lanes": {"norm_statistics": "lane"},
    "group": {"norm": "group"},
    "renorm": {"norm": "batch_renorm"},
    "power": {"norm": "power"},
    "vit": {"network": "vit", "depth": 2, "width": 16, "norm": "layer"},
    "recurrent": {"network": "recurrent", "depth": 1, "width": 16},
}


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
@pytest.mark.parametrize("model", NETWORKS.values(), ids=NETWORKS)
def test_a_recorded_training_ends_where_another_does(model, schedule, shards, tmp_path, cuda):
    options = {"epochs": 1, "learning_rate": 0.01, "schedule": schedule, "tf32": False, "deterministic": True}
    plain, recorded = (
        fit(alone("cuda"), make_job(shards, tmp_path / str(graphs), model, cuda_graphs=graphs, **options))
        for graphs in (False, True)
    )
    assert recorded.steps == plain.steps == 16
    assert recorded.train_loss == pytest.approx(plain.train_loss, rel=2e-3)
    assert recorded.final_loss == pytest.approx(plain.final_loss, rel=5e-3)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "adamw", "learning_rate": 0.002, "clip_norm": 1.0},
        {"optimizer": "lars", "learning_rate": 1.0, "clip_adaptive": 0.1},
        {"optimizer": "lamb", "learning_rate": 0.005, "head_learning_rate": 0.01},
    ],
    ids=lambda options: options["optimizer"],
)
def test_every_optimizer_is_recorded(options, shards, tmp_path, cuda):
    """With what clips gradients, and a rate for each group; and it goes on with the same bits."""
    given = {"epochs": 1, "tf32": False, "deterministic": True, **options}
    plain = fit(alone("cuda"), make_job(shards, tmp_path / "plain", **given))
    whole, cut = (make_job(shards, tmp_path / name, cuda_graphs=True, **given) for name in ("whole", "cut"))
    recorded = fit_until(alone("cuda"), whole, None)
    assert recorded.train_loss == pytest.approx(plain.train_loss, rel=2e-3)
    assert fit_until(alone("cuda"), cut, 9) is None
    assert fit_until(alone("cuda"), cut, None)
    assert_same_end(whole, cut)


def test_on_cpu_nothing_is_recorded(shards, tmp_path):
    plain, recorded = (
        fit(alone("cpu"), make_job(shards, tmp_path / str(graphs), epochs=1, cuda_graphs=graphs))
        for graphs in (False, True)
    )
    assert recorded.curve == plain.curve


@pytest.mark.parametrize("with_dropout", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("weight_ema", [None, 0.9])
def test_a_recorded_training_that_was_ended_goes_on_with_the_same_bits(
    weight_ema, with_dropout, shards, tmp_path, cuda
):
    options = {"cuda_graphs": True, "deterministic": True, "weight_ema": weight_ema}
    whole, cut = (make_job(shards, tmp_path / name, **options) for name in ("whole", "cut"))
    assert fit_until(alone("cuda"), whole, None, with_dropout)
    assert fit_until(alone("cuda"), cut, 17, with_dropout) is None
    assert newest(cut)["progress"]["step"] == 16
    assert fit_until(alone("cuda"), cut, None, with_dropout)
    assert_same_end(whole, cut)


def test_a_recorded_step_waits_for_nothing_but_its_loss(shards, tmp_path, cuda):
    with assemble(alone("cuda"), make_job(shards, tmp_path / "job", cuda_graphs=True, bf16=True)) as training:
        training.step.warm_up()
        training.checkpoints.restore()
        with training.loader.batches(0) as batches:
            for _ in range(2):  # the update is recorded with the second
                training.step.take(batches)
            with no_waiting():
                for _ in range(5):
                    training.step.take(batches)


@pytest.mark.parametrize("last_step", [0, 1, 3])
def test_a_recorded_loss_that_is_not_finite_changes_nothing(last_step, shards, tmp_path, cuda):
    with assemble(alone("cuda"), make_job(shards, tmp_path / "job", cuda_graphs=True)) as training:
        step, state = training.step, training.state
        step.warm_up()
        training.checkpoints.restore()
        with training.loader.batches(0) as batches:
            for _ in range(last_step):
                step.take(batches)
            with torch.no_grad():
                next(state.model.parameters()).fill_(float("inf"))
            weights = [parameter.detach().clone() for parameter in state.model.parameters()]
            assert step.take(batches) is Word.GO_ON
        assert state.progress.diverged
        assert state.progress.step == last_step
        for parameter, before in zip(state.model.parameters(), weights, strict=True):
            assert torch.equal(parameter, before)


class LooksAtValues(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.sum().item() > 0 else x


def look(moment):
    if moment.name == "network_built":
        moment.model.append(LooksAtValues())


def test_a_network_that_cannot_be_recorded_is_refused(shards, tmp_path, cuda):
    job = make_job(shards, tmp_path / "job", cuda_graphs=True)
    with pytest.raises(ValueError, match=r"train\.cuda_graphs: this network cannot be recorded"):
        fit(alone("cuda"), type(job)(**{**vars(job), "hook": partial(look)}))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert 0 <= torch.rand(3, device=cuda).sum().item() <= 3  # the device goes on


def test_no_memory_outlives_a_recorded_training(shards, tmp_path, cuda, held):
    fit(alone("cuda"), make_job(shards, tmp_path / "first", cuda_graphs=True))  # libraries keep workspaces of their own
    before = held()
    for name in ("second", "third"):
        fit(alone("cuda"), make_job(shards, tmp_path / name, cuda_graphs=True))
        assert held() <= before


def test_settings_that_cannot_be_recorded_are_refused():
    with pytest.raises(ValueError, match="cuda_graphs is for batches that are computed at once, and accumulate is 2"):
        TrainSettings(cuda_graphs=True, accumulate=2)
    with pytest.raises(ValueError, match=r"train\.cuda_graphs is for one worker.*there are 2: set it to false"):
        TrainSettings(cuda_graphs=True).for_workers(2)
