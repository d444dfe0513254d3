"""A launch that its driver ends: all ranks leave after one and the same step, and a later launch is not meant."""

import time
from dataclasses import replace

import pytest
from last_network import weights_after
from ranks import run_ranks

from pipeline import storage
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.distributed.worker import alone
from pipeline.training.job import TOKEN, Job
from pipeline.training.loop import fit
from pipeline.training.word import EndedError, FirstRank, Word, end_launch, looks_for_end


def make_job(dataset, folder, token="launch", **changes) -> Job:
    """A live job, as a driver launches it."""
    train = TrainSettings(epochs=2, batch_size=32, lanes=4, learning_rate=0.1, **changes)
    model = ModelSettings(depth=3, width=4, norm="group", norm_groups=2)
    return launched(Job(dataset, str(folder), model, train, live=True), token)


def launched(job, token):
    storage.publish(storage.join(job.folder, TOKEN), token.encode())
    return replace(job, token=token)


def end_at_the_first_evaluation(moment):
    if moment.name == "after_evaluation":
        end_launch(moment.job)
        time.sleep(0.2)  # longer than between two looks


def end_of(worker, job):
    """What a rank says of its end, None where it trains to the end of its schedule."""
    try:
        fit(worker, job)
    except EndedError as error:
        return str(error)


@pytest.mark.parametrize("world_size", [1, 2])
def test_all_ranks_end_after_the_same_step_and_the_next_launch_goes_on(dataset, tmp_path, world_size):
    whole = make_job(dataset, tmp_path / "whole")
    steps = fit(alone("cpu"), whole).steps
    job = make_job(dataset, tmp_path / "ended")
    says = run_ranks(end_of, world_size, replace(job, hook=end_at_the_first_evaluation))
    assert says == [f"the driver has ended this launch after step {steps // 2 + 1}"] * world_size
    again = launched(job, "another launch")
    assert run_ranks(end_of, world_size, again) == [None] * world_size
    assert weights_after(again).keys() == weights_after(whole).keys()


def test_nobody_looks_where_no_driver_waits_or_each_look_would_be_a_request(dataset, tmp_path, remote):
    job = make_job(dataset, tmp_path)
    assert looks_for_end(job)
    assert not looks_for_end(replace(job, live=False))
    assert not looks_for_end(replace(job, token=""))
    assert not looks_for_end(replace(job, folder=remote))


def test_the_word_of_the_first_rank_is_that_of_its_checkpoints_until_the_launch_is_ended(dataset, tmp_path):
    job = make_job(dataset, tmp_path)
    first = FirstRank(alone("cpu"), job, lambda step: step == 3)
    assert [first.word_after(step) for step in (2, 3)] == [Word.GO_ON, Word.SAVE]
    end_launch(replace(job, token="a launch before"))
    time.sleep(0.2)
    assert first.word_after(3) is Word.SAVE
    end_launch(job)
    time.sleep(0.2)
    assert first.word_after(3) is Word.END
