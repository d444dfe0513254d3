"""Properties of the plan over a grid of splits, lanes and worker counts."""

import numpy as np
import pytest

from pipeline.data import plan

GRID = [
    # group_rows, lanes, batch_size, shuffle_row_groups
    (np.full(48, 1250), 16, 256, 4),
    (np.array([7]), 1, 2, 1),
    (np.array([100, 1, 1, 99, 57, 3]), 4, 8, 2),
    (np.array([1000]), 8, 64, 3),
    (np.random.default_rng(0).integers(1, 90, 61), 16, 32, 5),
    (np.random.default_rng(1).integers(1, 9, 300), 8, 128, 7),
]


def make(group_rows, lanes, batch_size, window, seed=3, epoch=0):
    return plan.plan_epoch(
        group_rows, lanes=lanes, batch_size=batch_size, shuffle_row_groups=window, seed=seed, epoch=epoch
    )


@pytest.mark.parametrize("case", GRID)
def test_each_row_at_most_once_an_epoch_and_few_are_left_out(case):
    rows = plan.step_rows(make(*case))
    assert rows.shape[1:] == (case[1], case[2] // case[1])
    assert len(np.unique(rows)) == rows.size
    assert rows.min() >= 0
    assert rows.max() < case[0].sum()
    # What is left out: less than one row for each lane, and less than one batch.
    assert case[0].sum() - rows.size < case[1] + case[2]


@pytest.mark.parametrize("case", GRID)
def test_global_batches_are_the_same_for_any_number_of_workers(case):
    _, lanes, batch_size, _ = case
    epoch_plan = make(*case)
    reference = [np.sort(batch.ravel()) for batch in plan.step_rows(epoch_plan)]
    for world_size in (n for n in range(1, lanes + 1) if lanes % n == 0):
        ranks = [
            [rows_of(epoch_plan, lane) for lane in plan.rank_lanes(r, world_size, lanes)] for r in range(world_size)
        ]
        for step in range(epoch_plan.steps):
            cut = slice(step * batch_size // lanes, (step + 1) * batch_size // lanes)
            shares = [np.concatenate([lane[cut] for lane in lanes_of_rank]) for lanes_of_rank in ranks]
            assert {len(share) for share in shares} == {batch_size // world_size}
            np.testing.assert_array_equal(np.sort(np.concatenate(shares)), reference[step])


def rows_of(epoch_plan, lane, first_step=0):
    """Row numbers of a lane, worked out from its windows alone."""
    offsets = np.cumsum(epoch_plan.group_rows) - epoch_plan.group_rows
    rows = []
    for window in plan.lane_windows(epoch_plan, lane, first_step=first_step):
        together = np.concatenate([np.arange(offsets[g] + a, offsets[g] + b) for g, a, b in window.segments])
        rows.append(together[window.order][window.skip :])
    return np.concatenate(rows)


@pytest.mark.parametrize("case", GRID)
def test_starting_at_a_step_skips_what_came_before_it(case):
    epoch_plan = make(*case)
    for first_step in {0, 1, epoch_plan.steps // 2, epoch_plan.steps - 1}:
        for lane in range(case[1]):
            whole, rest = rows_of(epoch_plan, lane), rows_of(epoch_plan, lane, first_step)
            np.testing.assert_array_equal(rest, whole[first_step * epoch_plan.lane_batch :])


def test_order_depends_on_seed_and_epoch_alone():
    case = GRID[4]
    same = plan.step_rows(make(*case))
    np.testing.assert_array_equal(same, plan.step_rows(make(*case)))
    assert not np.array_equal(same, plan.step_rows(make(*case, seed=4)))
    assert not np.array_equal(same, plan.step_rows(make(*case, epoch=1)))


def test_every_epoch_deals_the_rows_anew_among_the_ranks():
    case = GRID[0]
    first, second = (set(plan.step_rows(make(*case, epoch=e))[:, ::2].ravel()) for e in (0, 1))
    kept = len(first & second) / len(first)
    assert 0.35 < kept < 0.65  # rank 0 of 2 keeps about half of its rows by chance


def test_rows_are_mixed_inside_a_lane():
    epoch_plan = make(*GRID[0])
    rows = rows_of(epoch_plan, 0)[:1000]
    neighbours = np.mean(np.abs(np.diff(rows)) == 1)
    assert neighbours < 0.01


@pytest.mark.parametrize("world_size", [0, 3, 5, 32])
def test_workers_that_do_not_divide_the_lanes(world_size):
    with pytest.raises(
        ValueError, match=rf"{world_size} workers do not divide 16 lanes: use one of \[1, 2, 4, 8, 16\]"
    ):
        plan.rank_lanes(0, world_size, 16)


def test_a_batch_larger_than_the_split():
    with pytest.raises(
        ValueError,
        match=r"batch_size 64 is larger than the split: 40 rows in 16 lanes; use a train\.batch_size of at most 32$",
    ):
        make(np.array([20, 20]), 16, 64, 2)


@pytest.mark.parametrize(
    ("total", "lanes", "fewer", "most"), [(7, 8, 4, 4), (7, 9, 3, 6), (13, 16, 8, 8), (1, 2, 1, 1)]
)
def test_a_split_with_fewer_rows_than_lanes_gets_lanes_and_a_batch_that_fit_together(total, lanes, fewer, most):
    with pytest.raises(
        ValueError,
        match=rf"{total} rows in {lanes} lanes; use train\.lanes={fewer} and a train\.batch_size of at most {most}$",
    ):
        make(np.array([total]), lanes, 4 * lanes, 2)
    assert make(np.array([total]), fewer, most, 2).steps == 1


@pytest.mark.parametrize("rows", [1, 2, 3, 10, 301])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_evaluation_counts_every_row_once(rows, world_size):
    cuts = [plan.rank_slice(rows, rank, world_size) for rank in range(world_size)]
    assert [row for first, end in cuts for row in range(first, end)] == list(range(rows))
    sizes = [end - first for first, end in cuts]
    assert max(sizes) - min(sizes) <= 1


def test_segments_of_a_slice():
    group_rows = np.array([5, 1, 4, 10])
    segments = plan.slice_segments(group_rows, 3, 12)
    assert segments.tolist() == [[0, 3, 5], [1, 0, 1], [2, 0, 4], [3, 0, 2]]
    assert plan.slice_segments(group_rows, 4, 4).tolist() == []
