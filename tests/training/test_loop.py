from dataclasses import replace

import pytest
import torch
from last_network import weights_after
from ranks import run_ranks

from pipeline.config.augment import AugmentSettings
from pipeline.config.dataset import ReaderSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest, plan
from pipeline.data.loader import check_data
from pipeline.distributed.worker import alone
from pipeline.telemetry.events import EventReader
from pipeline.training import checkpoint
from pipeline.training.assembly import assemble
from pipeline.training.job import Job, identity
from pipeline.training.loop import fit
from pipeline.training.step import DivergedError

pytestmark = pytest.mark.long


def make_job(dataset, folder, norm="group", **changes) -> Job:
    train = {"epochs": 2, "batch_size": 32, "lanes": 4, "learning_rate": 0.1, "evaluations_per_epoch": 2, **changes}
    return Job(dataset, str(folder), ModelSettings(depth=3, width=4, norm=norm, norm_groups=2), TrainSettings(**train))


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_it_learns_in_a_world_of_one(dataset, tmp_path, norm):
    result = fit(alone("cpu"), make_job(dataset, tmp_path, norm, epochs=4))
    assert result.best_accuracy > 0.9
    assert result.final_accuracy == result.curve[-1].accuracy
    assert result.best_accuracy == max(point.accuracy for point in result.curve)
    assert not result.diverged
    assert result.steps == 4 * (result.curve[-1].step // 4)
    assert len(result.curve) == len(result.train_loss) == 8
    assert result.images_per_second > 0
    assert 0 <= result.data_wait_share < 1


def test_events_tell_each_step_once(dataset, tmp_path):
    result = fit(alone("cpu"), make_job(dataset, tmp_path))
    events = EventReader(str(tmp_path / "events")).new()
    assert events[0]["kind"] == "start"
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, result.steps + 1))
    evaluations = [e for e in events if e["kind"] == "evaluation"]
    assert [(e["step"], e["accuracy"]) for e in evaluations] == [(p.step, p.accuracy) for p in result.curve]


def test_logging_fewer_steps_changes_nothing_else(dataset, tmp_path):
    every = fit(alone("cpu"), make_job(dataset, tmp_path / "every"))
    some = fit(alone("cpu"), make_job(dataset, tmp_path / "some", log_every_steps=7))
    assert some.curve == every.curve
    steps = [e["step"] for e in EventReader(str(tmp_path / "some" / "events")).new() if e["kind"] == "step"]
    assert steps == list(range(7, every.steps + 1, 7))


def gradients(worker, job):
    """Gradients of the first global batch, and its loss."""
    with assemble(worker, job) as training, training.loader.batches(0) as batches:
        loss = training.step.gradients(next(batches), step=0).loss
        return {name: p.grad.clone() for name, p in training.state.model.named_parameters()}, loss


@pytest.mark.parametrize("norm", ["none", "group", "layer"])
def test_gradients_of_one_global_batch_do_not_depend_on_the_number_of_ranks(dataset, tmp_path, norm):
    job = make_job(dataset, tmp_path, norm, augment=AugmentSettings(flip=True, shift=1))
    (reference, loss), *_ = run_ranks(gradients, 1, job)
    for world_size in (2, 4):
        results = run_ranks(gradients, world_size, job)
        for found, global_loss in results:
            assert global_loss == pytest.approx(loss, rel=1e-5)
            for name, gradient in reference.items():
                scale = gradient.abs().max().item()
                torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale, msg=name)


def test_two_ranks_end_where_one_does(dataset, tmp_path):
    one, two = (make_job(dataset, tmp_path / name) for name in ("one", "two"))
    (alone_result,) = run_ranks(fit, 1, one)
    results = run_ranks(fit, 2, two)
    assert results[0].curve == results[1].curve
    for found, expected in zip(results[0].curve, alone_result.curve, strict=True):
        assert found.step == expected.step
        assert found.loss == pytest.approx(expected.loss, rel=1e-3)
    for name, weight in weights_after(one).items():
        torch.testing.assert_close(weights_after(two)[name], weight, rtol=1e-2, atol=1e-3)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_going_on_from_a_checkpoint_ends_with_the_same_bits(dataset, tmp_path, norm):
    changes = {"epochs": 3, "augment": AugmentSettings(flip=True, shift=1)}
    undisturbed, killed = (make_job(dataset, tmp_path / name, norm, **changes) for name in ("undisturbed", "killed"))
    expected = fit(alone("cpu"), undisturbed)

    def die_in_the_middle_of_the_second_epoch(moment):
        if moment.name == "before_data" and moment.step == moment.steps_per_epoch + 3:
            raise Killed

    with pytest.raises(Killed):
        fit(alone("cpu"), replace(killed, hook=die_in_the_middle_of_the_second_epoch))
    result = fit(alone("cpu"), killed)
    assert result.curve == expected.curve
    for name, weight in weights_after(undisturbed).items():
        assert torch.equal(weights_after(killed)[name], weight), name


def test_a_finished_run_is_not_trained_again(dataset, tmp_path):
    job = make_job(dataset, tmp_path)
    first = fit(alone("cpu"), job)
    moments = []
    again = fit(alone("cpu"), replace(job, hook=lambda moment: moments.append(moment.name)))
    assert moments == ["network_built", "restored"]
    assert again.curve == first.curve


def test_checkpoints_of_other_settings_are_refused(dataset, tmp_path):
    fit(alone("cpu"), make_job(dataset, tmp_path, epochs=1))
    with pytest.raises(checkpoint.CheckpointError, match=r"train\.epochs is 1 there, 2 here"):
        fit(alone("cpu"), make_job(dataset, tmp_path, epochs=2))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_stops_all_before_the_optimizer(dataset, tmp_path, world_size):
    job = make_job(dataset, tmp_path, "none", learning_rate=1e30, warmup_epochs=0)
    for result in run_ranks(fit, world_size, job):
        assert result.diverged
        assert 0 < result.steps < 10
        assert 0 <= result.final_accuracy <= 1
    assert all(torch.isfinite(weight).all() for weight in weights_after(job).values())
    assert [e["kind"] for e in EventReader(str(tmp_path / "events")).new()].count("diverged") == 1


def test_a_diverged_run_says_so_again_when_it_is_continued(dataset, tmp_path):
    job = make_job(dataset, tmp_path, "none", learning_rate=1e30, warmup_epochs=0)
    assert fit(alone("cpu"), job).diverged
    assert fit(alone("cpu"), job).diverged


@pytest.mark.parametrize("setting", [{"bf16": True}, {"channels_last": False}, {"label_smoothing": 0.1}])
def test_optional_ways_learn_too(dataset, tmp_path, setting):
    assert fit(alone("cpu"), make_job(dataset, tmp_path, "batch", epochs=4, **setting)).best_accuracy > 0.9


def test_the_loss_is_that_of_smoothed_labels(dataset, tmp_path):
    job = make_job(dataset, tmp_path, label_smoothing=0.3)
    with assemble(alone("cpu"), job) as training, training.loader.batches(0) as batches:
        batch = next(batches)
        loss = training.step.gradients(batch, step=0).loss
    with torch.no_grad():
        logits = training.state.model(batch.images)
    smoothed, plain = (
        torch.nn.functional.cross_entropy(logits, batch.labels, label_smoothing=share).item() for share in (0.3, 0.0)
    )
    assert loss == pytest.approx(smoothed, rel=1e-5)
    assert loss != pytest.approx(plain, rel=1e-3)


def test_all_ranks_evaluate_with_the_same_statistics_and_keep_their_own(dataset, tmp_path):
    judged, own = zip(*run_ranks(final_buffers, 2, make_job(dataset, tmp_path, "batch", epochs=1)), strict=True)
    assert judged[0].keys() == own[0].keys()
    assert all(torch.equal(judged[0][name], judged[1][name]) for name in judged[0])
    running = [name for name in own[0] if "running_" in name]
    assert len(running) == 6
    assert not any(torch.equal(own[0][name], own[1][name]) for name in running)


def final_buffers(worker, job):
    fit(worker, job)
    with assemble(worker, job) as training:
        training.checkpoints.restore()
        evaluated = training.evaluator.run().state
        return evaluated, {name: buffer.clone() for name, buffer in training.state.model.named_buffers()}


def test_norm_parameters_and_biases_do_not_decay(dataset, tmp_path):
    with assemble(alone("cpu"), make_job(dataset, tmp_path, "batch", weight_decay=0.5)) as training:
        decayed, kept = training.state.optimizer.param_groups
        names = {id(parameter): name for name, parameter in training.state.model.named_parameters()}
    assert decayed["weight_decay"] == 0.5
    assert kept["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and p.ndim in (2, 4) for p in decayed["params"])
    assert len(kept["params"]) == 7  # scale and shift of three norms, and the classifier's bias
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


@pytest.mark.parametrize(
    ("changes", "world_size", "message"),
    [
        ({}, 3, r"3 workers do not divide 4 lanes: use one of \[1, 2, 4\]"),
        ({"evaluate_on": "holdout"}, 1, "no split 'holdout'; it has test, train, validation"),
        ({"batch_size": 4096}, 1, "batch_size 4096 is larger than the split"),
        (
            {"batch_size": 64, "lanes": 64},
            1,
            r"row groups, fewer than train.lanes 64: .*row_group_rows of at most 12",
        ),
    ],
)
def test_what_does_not_fit_is_said_before_the_start(dataset, tmp_path, changes, world_size, message):
    with pytest.raises(ValueError, match=message):
        check_data(load_manifest(dataset), make_job(dataset, tmp_path, **changes).train, ReaderSettings(), world_size)


def test_lanes_of_a_rank_are_those_of_the_plan():
    assert list(plan.rank_lanes(1, 2, 8)) == [1, 3, 5, 7]


@pytest.mark.parametrize("world_size", [1, 2])
def test_accumulated_parts_give_the_gradients_of_the_whole_batch(dataset, tmp_path, world_size):
    whole, parts = (make_job(dataset, tmp_path, "group", accumulate=count) for count in (1, 4))
    expected, loss = run_ranks(gradients, world_size, whole)[0]
    found, same_loss = run_ranks(gradients, world_size, parts)[0]
    assert same_loss == pytest.approx(loss, rel=1e-5)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item(), msg=name)


def test_compressed_gradients_are_the_exact_ones_rounded(dataset, tmp_path):
    exact, rounded = (make_job(dataset, tmp_path, "group", gradient_compression=c) for c in ("none", "bf16"))
    expected, _ = run_ranks(gradients, 2, exact)[0]
    results = run_ranks(gradients, 2, rounded)
    for name, gradient in expected.items():
        assert torch.equal(results[0][0][name], results[1][0][name])
        assert not torch.equal(results[0][0][name], gradient)
        # bfloat16 has 8 bits: each of two addends and their sum is off by at most 2^-9 of its size.
        torch.testing.assert_close(results[0][0][name], gradient, rtol=0.02, atol=0.02 * gradient.abs().max().item())
    assert run_ranks(fit, 2, make_job(dataset, tmp_path / "r", gradient_compression="bf16"))[0].best_accuracy > 0.5


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_loss_that_is_not_finite_fails_where_that_is_asked_for(dataset, tmp_path, world_size):
    job = make_job(dataset, tmp_path, "none", learning_rate=1e30, warmup_epochs=0, on_divergence="fail")
    with pytest.raises(DivergedError, match=r"the loss of rank [\d, ]+ is not finite at step \d+, learning rate \d"):
        run_ranks(fit, world_size, job)


def test_every_rank_says_what_its_time_went_into(dataset, tmp_path):
    result = run_ranks(fit, 2, make_job(dataset, tmp_path, epochs=1))[0]
    assert [rank.rank for rank in result.ranks] == [0, 1]
    for rank in result.ranks:
        assert rank.steps == result.steps
        assert rank.compute_seconds > 0
        assert rank.all_reduce_seconds > 0
        assert rank.data_wait_seconds > 0
    evaluations = [e for e in EventReader(str(tmp_path / "events")).new() if e["kind"] == "evaluation"]
    assert sum(e["ranks"][1]["steps"] for e in evaluations) == result.steps


def test_a_state_that_cannot_be_written_is_told_and_the_last_one_is_an_error(dataset, tmp_path):
    def disk_is_full(moment):
        if moment.name == "before_write":
            raise OSError(28, "No space left on device")

    def disk_is_full_in_the_first_epoch(moment):
        if moment.step <= moment.steps_per_epoch:
            disk_is_full(moment)

    with pytest.raises(OSError, match="No space left"):
        fit(alone("cpu"), replace(make_job(dataset, tmp_path / "full"), hook=disk_is_full))
    warnings = [e for e in EventReader(str(tmp_path / "full" / "events")).new() if e["kind"] == "warning"]
    assert "No space left on device; training goes on" in warnings[0]["text"]
    job = make_job(dataset, tmp_path / "room")
    assert fit(alone("cpu"), replace(job, hook=disk_is_full_in_the_first_epoch)).checkpoint


def test_a_hook_sees_the_moments_of_a_training_in_order(dataset, tmp_path):
    moments = []

    def note(moment):
        moments.append((moment.name, moment.step))
        if moment.name == "checkpoint_begun":
            moment.wait_until_written()

    job = make_job(dataset, tmp_path, epochs=1, evaluations_per_epoch=1)
    result = fit(alone("cpu"), replace(job, hook=note))
    steps = [(name, step + (name == "after_step")) for step in range(result.steps)
             for name in ("before_data", "after_step")]  # fmt: skip
    end = ["after_evaluation", "checkpoint_begun", "before_write", "after_write"]
    assert moments[: 2 + len(steps)] == [("network_built", 0), ("restored", 0), *steps]
    assert sorted(moments[2 + len(steps) :]) == sorted((name, result.steps) for name in end)
    assert identity(replace(job, hook=note)) == identity(job)
