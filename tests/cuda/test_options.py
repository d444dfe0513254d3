"""Settings that change how a training is computed or watched, and not what comes out of it."""

from dataclasses import replace

import pytest
import torch
from gpu_jobs import assert_same_end, make_job, newest
from ranks import fit_until
from torch._dynamo.utils import counters

from pipeline.config.training import DiagnosticsSettings
from pipeline.distributed.worker import alone
from pipeline.training.assembly import assemble
from pipeline.training.loop import fit


def test_a_look_into_the_network_changes_nothing(shards, tmp_path, device):
    plain, watched = (
        make_job(shards, tmp_path / name, {"network": "cnn"}, epochs=1, deterministic=True,
                 diagnostics=DiagnosticsSettings(every_steps=every))
        for name, every in (("plain", None), ("watched", 4))
    )  # fmt: skip
    for job in (plain, watched):
        fit(alone(device.type), job)
    assert_same_end(plain, watched)


def test_states_are_copied_while_steps_go_on(shards, tmp_path, device):
    """The host is ahead of a GPU: what is saved after a step is nevertheless the state after that step."""
    job = make_job(shards, tmp_path / "job", epochs=1, deterministic=True, weight_ema=0.9)
    with assemble(alone(device.type), job) as training:
        step, state = training.step, training.state
        step.warm_up()
        training.checkpoints.restore()
        with training.loader.batches(0) as read:
            batches = step.data.ahead(read)
            for _ in range(4):
                step.take(batches)
            if device.type == "cuda":
                torch.cuda._sleep(200_000_000)  # a tenth of a second, in which all that follows is only queued
            training.checkpoints.save()
            expected = [parameter.detach().clone() for parameter in state.model.parameters()]
            trained = [each for group in state.optimizer.param_groups for each in group["params"]]
            momentum = [state.optimizer.state[each]["momentum_buffer"].clone() for each in trained]
            for _ in range(4):
                step.take(batches)
        training.checkpoints.finish()
        names = [name for name, _ in state.model.named_parameters()]
    saved = newest(job)
    assert saved["progress"]["step"] == 4
    for name, value in zip(names, expected, strict=True):
        assert torch.equal(saved["weights"][name], value.cpu()), name
    for number, value in enumerate(momentum):
        assert torch.equal(saved["optimizer"]["state"][number]["momentum_buffer"], value.cpu())


@pytest.mark.slow  # on CPU a minute of compiling
def test_a_network_is_compiled_once(shards, tmp_path, device):
    """Once for training and once for evaluations; not again for later steps, nor where the training goes on."""
    counters.clear()
    whole, cut = (make_job(shards, tmp_path / name, {"width": 4}, compile=True) for name in ("whole", "cut"))
    graphs = []

    def note(moment):
        if moment.name == "after_evaluation":
            graphs.append(counters["stats"]["unique_graphs"])

    result = fit(alone(device.type), replace(whole, hook=note))
    assert len(graphs) == 2
    assert graphs[0] == graphs[1] <= 3
    expected = fit(alone(device.type), make_job(shards, tmp_path / "plain", {"width": 4}))
    assert result.curve[-1].loss == pytest.approx(expected.curve[-1].loss, rel=0.1)
    assert fit_until(alone(device.type), cut, 20) is None
    assert fit(alone(device.type), cut).curve[-1].loss == pytest.approx(result.curve[-1].loss, rel=1e-3)
