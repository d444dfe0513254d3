"""What the steps of a rank spend their time on."""

import time

import pytest

from pipeline.training.result import RankSeconds, TrainResult, describe
from pipeline.training.timing import StepTimes


def spent(rank, data, compute, others, steps=1000):
    return RankSeconds(
        rank=rank, steps=steps, data_wait_seconds=data, compute_seconds=compute, all_reduce_seconds=others
    )


def test_the_parts_of_a_step_are_its_whole():
    times = StepTimes()
    times.begin()
    time.sleep(0.02)
    times.data_arrived()
    computed_at = time.perf_counter()
    time.sleep(0.03)
    times.gradients_arrived(time.perf_counter() - computed_at)
    times.end()
    taken = times.take()
    assert taken.steps == 1
    assert taken.data_wait_seconds >= 0.02
    assert taken.all_reduce_seconds >= 0.03
    parts = taken.data_wait_seconds + taken.compute_seconds + taken.all_reduce_seconds
    assert parts == pytest.approx(times.last_seconds)
    assert times.take().steps == 0  # taken once


def result(*ranks, attempts=1):
    return TrainResult(
        best_accuracy=1, final_accuracy=1, final_balanced_accuracy=1, final_macro_f1=1, final_loss=0.0,
        final_calibration_error=0.0, recall=(), steps=1000, images_per_second=None, data_wait_share=None,
        diverged=False, curve=(), train_loss=(), train_seconds=(), checkpoint="", world_size=len(ranks),
        attempts=attempts, ranks=ranks,
    )  # fmt: skip


def test_a_line_for_each_rank():
    two = result(spent(0, 1.0, 8.0, 1.0), spent(1, 0.0, 5.0, 5.0), attempts=2)
    assert describe(two) == [
        "rank 0: 1,000 steps since the last restart in 10.0 s, 80% computing, 10% waiting for data, 10% for the other"
        " ranks",
        "rank 1: 1,000 steps since the last restart in 10.0 s, 50% computing, 0% waiting for data, 50% for the other"
        " ranks",
    ]


def test_a_rank_alone_waits_for_nobody_and_one_without_steps_has_no_line():
    assert describe(result(spent(0, 1.0, 9.0, 0.0))) == [
        "rank 0: 1,000 steps in 10.0 s, 90% computing, 10% waiting for data"
    ]
    assert describe(result(spent(0, 0.0, 0.0, 0.0, steps=0))) == []
