"""Going on from a checkpoint: the same bits with as many ranks, the same batches with fewer or more."""

import json
from dataclasses import replace

import pytest
import torch
from ranks import fit_until, run_ranks
from small_training import equal

from pipeline import storage
from pipeline.config.augment import AugmentSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, TrainSettings
from pipeline.distributed.worker import alone
from pipeline.telemetry.events import EventReader
from pipeline.training import checkpoint, rank_state
from pipeline.training.assembly import assemble
from pipeline.training.job import Job, identity
from pipeline.training.loop import fit
from pipeline.training.versions import VersionsError, current_versions

pytestmark = pytest.mark.long


def make_job(dataset, folder, norm="batch", *, every_steps=3, **changes):
    train = {"epochs": 2, "batch_size": 32, "lanes": 4, "learning_rate": 0.1,
             "augment": AugmentSettings(flip=True, shift=1), **changes}  # fmt: skip
    model = ModelSettings(depth=3, width=4, norm=norm, norm_groups=2)
    when = CheckpointSettings(every_steps=every_steps)
    return Job(dataset, str(folder), model, TrainSettings(**train), checkpoint=when)


def state_of(job):
    folder = storage.join(job.folder, "checkpoints")
    return checkpoint.load_newest(folder, identity=identity(job), device=torch.device("cpu"))


@pytest.mark.parametrize("world_size", [1, 2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("with_dropout", [False, True])
def test_a_run_that_dies_in_an_epoch_ends_with_the_same_bits(dataset, tmp_path, world_size, with_dropout):
    undisturbed, killed = (make_job(dataset, tmp_path / name) for name in ("undisturbed", "killed"))
    expected = run_ranks(fit_until, world_size, undisturbed, None, with_dropout)[0]
    assert run_ranks(fit_until, world_size, killed, 11, with_dropout) == [None] * world_size
    assert 0 < state_of(killed)["progress"]["step"] <= 11
    result = run_ranks(fit_until, world_size, killed, None, with_dropout)[0]
    assert result.curve == expected.curve
    assert result.train_loss == expected.train_loss
    before, after = state_of(undisturbed), state_of(killed)
    for name, weight in before["model"].items():
        assert torch.equal(after["model"][name], weight), name
    for mine, theirs in zip(before["ranks"], after["ranks"], strict=True):
        assert all(torch.equal(mine["buffers"][name], theirs["buffers"][name]) for name in mine["buffers"])
        assert torch.equal(mine["torch"], theirs["torch"])


def test_ranks_draw_random_numbers_of_their_own(dataset, tmp_path):
    job = make_job(dataset, tmp_path, epochs=1)
    run_ranks(fit_until, 2, job, None, True)
    first, second = state_of(job)["ranks"]
    assert not torch.equal(first["torch"], second["torch"])


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (2, 1)])
def test_another_number_of_ranks_goes_on_with_the_same_batches(dataset, tmp_path, before, after):
    """Without batch norm the result is that of an undisturbed run but for the order of sums."""
    undisturbed, moved = (make_job(dataset, tmp_path / name, "group") for name in ("undisturbed", "moved"))
    expected = run_ranks(fit, 1, undisturbed)[0]
    run_ranks(fit_until, before, moved, 11)
    result = run_ranks(fit, after, moved)[0]
    assert result.world_size == after
    for found, point in zip(result.curve, expected.curve, strict=True):
        assert found.step == point.step
        assert found.loss == pytest.approx(point.loss, rel=1e-3)


def test_another_number_of_ranks_gets_the_statistics_of_all(dataset, tmp_path):
    job = make_job(dataset, tmp_path)
    run_ranks(fit_until, 4, job, 11)
    ranks = [rank["buffers"] for rank in state_of(job)["ranks"]]
    name = next(name for name in ranks[0] if name.endswith("running_mean"))
    variance = name.replace("mean", "var")
    with assemble(alone("cpu"), job) as training:
        joint = rank_state.joint_buffers(training.state.model, ranks)
    torch.testing.assert_close(joint[name], torch.stack([rank[name] for rank in ranks]).mean(0))
    # Law of total variance, written another way: the mean of squares less the square of the mean.
    squares = torch.stack([rank[variance].double() + rank[name].double() ** 2 for rank in ranks]).mean(0)
    torch.testing.assert_close(joint[variance].double(), squares - joint[name].double() ** 2, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(joint[variance], ranks[0][variance])
    restored = run_ranks(buffers_after_restore, 2, job)
    assert all(torch.allclose(buffers[variance], joint[variance]) for buffers in restored)


def buffers_after_restore(worker, job):
    with assemble(worker, job) as training:
        training.checkpoints.restore()
        return {name: buffer.clone() for name, buffer in training.state.model.named_buffers()}


def test_checkpoints_are_written_by_steps_or_by_time(dataset, tmp_path):
    fit(alone("cpu"), make_job(dataset, tmp_path / "steps", every_steps=5))
    steps = [e["step"] for e in EventReader(str(tmp_path / "steps" / "events")).new() if e["kind"] == "checkpoint"]
    job = make_job(dataset, tmp_path / "time", every_steps=None)
    fit(alone("cpu"), job)
    by_time = [e["step"] for e in EventReader(str(tmp_path / "time" / "events")).new() if e["kind"] == "checkpoint"]
    last = state_of(job)["progress"]["step"]
    assert by_time == [last // 2, last]  # far less than a minute: the ends of the epochs
    assert set(by_time) <= set(steps)
    assert all(step % 5 == 0 for step in set(steps) - set(by_time))
    assert len(steps) > len(by_time)


def test_a_damaged_checkpoint_is_passed_over_and_the_bits_are_the_same(dataset, tmp_path, caplog):
    undisturbed, killed = (make_job(dataset, tmp_path / name) for name in ("undisturbed", "killed"))
    fit(alone("cpu"), undisturbed)
    fit_until(alone("cpu"), killed, 11)
    newest = sorted((tmp_path / "killed" / "checkpoints").glob("*.pt"))[-1]
    newest.write_bytes(newest.read_bytes()[:-100])
    fit(alone("cpu"), killed)
    assert "trying the one before it" in caplog.text
    (told,) = warnings_of(killed)
    assert told in caplog.text
    before, after = state_of(undisturbed)["model"], state_of(killed)["model"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def warnings_of(job):
    """What the driver's bar shows of it."""
    return [event["text"] for event in EventReader(f"{job.folder}/events").new() if event["kind"] == "warning"]


def test_going_on_with_other_versions_is_told_or_refused(dataset, tmp_path):
    job = make_job(dataset, tmp_path, epochs=1)
    fit_until(alone("cpu"), job, 11)
    step = state_of(job)["progress"]["step"]
    seal = tmp_path / "checkpoints" / f"step-{step:08d}.json"
    seal.write_text(json.dumps({**json.loads(seal.read_text()), "versions": {"sparknorm": "0.6.0", "torch": "2.4.1"}}))
    refusing = replace(job, checkpoint=job.checkpoint.model_copy(update={"other_versions": "refuse"}))
    with pytest.raises(VersionsError, match=rf"step-{step:08d} was made with sparknorm 0\.6\.0 and torch 2\.4\.1, "):
        fit(alone("cpu"), refusing)
    assert warnings_of(job) == []
    result = fit(alone("cpu"), job)
    (text,) = warnings_of(job)
    assert f"step-{step:08d} was made with sparknorm 0.6.0 and torch 2.4.1, and here is sparknorm " in text
    assert result.versions == current_versions()
    assert fit(alone("cpu"), refusing).curve == result.curve  # the checkpoints are of these versions now


@pytest.mark.parametrize("schedule", ["cosine", "one_cycle"])
def test_a_job_that_stops_at_the_ends_of_cycles_ends_with_the_same_bits(dataset, tmp_path, schedule):
    """As a search trains a candidate rung by rung: cycles of 12, 24 and 39 of 75 steps, none of whole epochs."""
    options = {"epochs": 3, "first_cycle_epochs": 12 / 25, "schedule": schedule, "weight_ema": 0.9}
    through, stopped = (make_job(dataset, tmp_path / name, **options) for name in ("through", "stopped"))
    expected = fit(alone("cpu"), through)
    steps = []
    for cycle in (1, 2, 2, None):  # the second time there is nothing left to do
        result = fit(alone("cpu"), replace(stopped, until_cycle=cycle))
        steps.append(result.steps)
        assert state_of(stopped)["progress"]["step"] == result.steps == result.curve[-1].step
    assert steps == [12, 36, 36, 75]
    assert result.curve == expected.curve
    assert [point.step for point in result.curve] == [12, 25, 36, 50, 75]
    assert equal(without_times(state_of(stopped)), without_times(state_of(through)))
    assert identity(replace(stopped, until_cycle=1)) == identity(stopped)


def without_times(state):
    progress = {key: value for key, value in state["progress"].items() if "seconds" not in key and "timed" not in key}
    return {**state, "progress": progress}
