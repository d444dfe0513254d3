"""Balanced sampling: equal shares of all classes, and all that lanes promise beside."""

from dataclasses import replace

import numpy as np
import pytest
from small_shards import write_dataset

from pipeline.config.dataset import ReaderSettings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest, plan
from pipeline.data.loader import TrainLoader, check_data, train_labels
from pipeline.data.manifest import DatasetError
from pipeline.distributed.worker import alone

LONG_TAIL = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [610, 61, 19]))
# Row groups of one class: most windows lack the others.
SORTED = np.sort(LONG_TAIL)
GROUP_ROWS = np.array([90, 31, 7, 100, 122, 100, 1, 139, 60, 40])
CASES = [
    # labels, lanes, batch_size, shuffle_row_groups
    (LONG_TAIL, 4, 32, 2),
    (LONG_TAIL, 8, 64, 3),
    (SORTED, 4, 32, 2),
    (SORTED, 4, 600, 1),
    (np.zeros(690, np.int32), 4, 32, 2),
]


def make(labels, lanes, batch_size, window, seed=3, epoch=0):
    return plan.plan_epoch(
        GROUP_ROWS, lanes=lanes, batch_size=batch_size, shuffle_row_groups=window, seed=seed, epoch=epoch,
        copies=plan.balanced_copies(labels, seed=seed, epoch=epoch),
    )  # fmt: skip


@pytest.mark.parametrize("labels", [LONG_TAIL, SORTED, LONG_TAIL * 2 + 1])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_classes_have_equal_shares_and_rows_of_a_class_nearly_equal_ones(labels, epoch):
    copies = plan.balanced_copies(labels, seed=5, epoch=epoch)
    assert copies.sum() == len(labels)
    for number in np.unique(labels):
        of_class = copies[labels == number]
        assert of_class.sum() == 230  # a third of 690
        assert set(of_class) <= {230 // len(of_class), -(-230 // len(of_class))}


def test_shares_that_do_not_divide_differ_by_one_row():
    labels = np.array([0] * 7 + [1] * 2 + [4] * 1)
    copies = plan.balanced_copies(labels, seed=0, epoch=0)
    assert [int(copies[labels == number].sum()) for number in (0, 1, 4)] == [4, 3, 3]


def test_rows_of_a_large_class_take_turns_over_epochs():
    """A row of the largest class comes 230/610 times an epoch: over 30 epochs 11.3 times, and no row is forgotten."""
    total = sum(plan.balanced_copies(LONG_TAIL, seed=1, epoch=epoch).astype(int) for epoch in range(30))
    of_class = total[LONG_TAIL == 0]
    assert of_class.mean() == pytest.approx(30 * 230 / 610)
    assert of_class.min() >= 8 and of_class.max() <= 15


def test_a_row_is_drawn_as_often_as_its_share_whatever_the_seed():
    """Over seeds, each row of a class comes equally often in the mean: n = 2,000, four deviations."""
    labels = np.array([0, 1, 0, 0, 1, 0, 0])
    counts = np.mean([plan.balanced_copies(labels, seed=seed, epoch=3) for seed in range(2000)], axis=0)
    expected = np.where(labels == 0, 4 / 5, 3 / 2)
    deviation = np.where(labels == 0, np.sqrt(0.8 * 0.2 / 2000), np.sqrt(0.25 / 2000))
    assert (np.abs(counts - expected) < 4 * deviation).all()


@pytest.mark.parametrize("case", CASES)
def test_an_epoch_draws_the_copies_and_no_other_rows(case):
    epoch_plan = make(*case)
    rows = plan.step_rows(epoch_plan)
    drawn = np.bincount(rows.ravel(), minlength=690)
    assert (drawn <= epoch_plan.copies).all()
    assert 690 - rows.size < case[1] + case[2]  # as many are left out as without balanced sampling
    assert epoch_plan.steps == (690 // case[1]) // (case[2] // case[1])


@pytest.mark.parametrize("case", CASES)
def test_starting_at_a_step_skips_what_came_before_it(case):
    epoch_plan = make(*case)
    for first_step in {0, 1, epoch_plan.steps // 2, epoch_plan.steps - 1}:
        for lane in range(case[1]):
            whole = used_rows(epoch_plan, lane)
            np.testing.assert_array_equal(
                used_rows(epoch_plan, lane, first_step), whole[first_step * epoch_plan.lane_batch :]
            )


def used_rows(epoch_plan, lane, first_step=0):
    offsets = np.cumsum(epoch_plan.group_rows) - epoch_plan.group_rows
    rows = []
    for window in plan.lane_windows(epoch_plan, lane, first_step=first_step):
        read = np.concatenate([np.arange(offsets[g] + a, offsets[g] + b) for g, a, b in window.segments])
        assert len(read) == window.rows_read
        rows.append(read[window.order][window.skip :])
    return np.concatenate(rows)


def test_windows_that_lack_a_class_leave_the_shares_of_the_epoch_equal():
    epoch_plan = make(SORTED, 4, 32, 1)
    windows = [window for lane in range(4) for window in plan.lane_windows(epoch_plan, lane)]
    offsets = np.cumsum(GROUP_ROWS) - GROUP_ROWS
    classes_of = [
        {int(SORTED[offsets[g] + row]) for g, first, end in w.segments for row in (first, end - 1)} for w in windows
    ]
    assert sum(len(classes) == 1 for classes in classes_of) > len(windows) / 2
    shares = np.bincount(SORTED[plan.step_rows(epoch_plan).ravel()]) / 690
    assert np.abs(shares - 1 / 3).max() < (4 + 32) / 690


# From shards to batches.

TRAIN = TrainSettings(
    epochs=3, batch_size=32, lanes=4, sampling="balanced", shuffle_row_groups=2, seed=9, evaluate_on="train"
)
SHARDS = (251, 300, 120, 19)


@pytest.fixture(scope="module", params=["mixed", "sorted"])
def stored(request, tmp_path_factory):
    """One split, raw and as PNG, with its images by their bytes, and labels."""
    folder = tmp_path_factory.mktemp(request.param)
    labels = LONG_TAIL if request.param == "mixed" else SORTED
    for encoding in ("raw", "png"):
        pixels, _ = write_dataset(f"{folder}/{encoding}", SHARDS, row_group_rows=25, encoding=encoding, labels=labels)
    return folder, pixels, labels


def batches_of(folder, world_size, rank, step=0, train=TRAIN, **settings):
    worker = replace(alone("cpu"), rank=rank, world_size=world_size)
    manifest = load_manifest(str(folder))
    loader = TrainLoader(str(folder), manifest, train, ReaderSettings(**settings), worker)
    with loader.batches(step) as batches:
        made = [(batch.images.numpy(), batch.labels.numpy()) for batch in batches]
    loader.close()
    return made, loader.steps_per_epoch


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("memory_bytes", [0, 1 << 30], ids=["streaming", "resident"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_global_batches_are_those_of_the_plan_for_any_number_of_workers(stored, encoding, memory_bytes, world_size):
    folder, pixels, labels = stored
    ranks = [batches_of(folder / encoding, world_size, rank, memory_bytes=memory_bytes) for rank in range(world_size)]
    assert {steps for _, steps in ranks} == {690 // 4 // 8}
    assert {len(made) for made, _ in ranks} == {3 * 21}
    groups = np.array([group.rows for group in load_manifest(str(folder / encoding)).split("train").row_groups])
    for epoch in range(3):
        planned = plan.plan_epoch(
            groups, lanes=4, batch_size=32, shuffle_row_groups=2, seed=9, epoch=epoch,
            copies=plan.balanced_copies(labels, seed=9, epoch=epoch),
        )  # fmt: skip
        for step, rows in enumerate(plan.step_rows(planned)):
            for rank, (made, _) in enumerate(ranks):
                images, of_batch = made[21 * epoch + step]
                mine = rows[rank::world_size].ravel()
                np.testing.assert_array_equal(images, pixels[mine])
                np.testing.assert_array_equal(of_batch, labels[mine])


@pytest.mark.parametrize("memory_bytes", [0, 1 << 30], ids=["streaming", "resident"])
@pytest.mark.parametrize("step", [1, 13, 21, 35])
def test_going_on_in_the_middle_gives_the_rest(stored, memory_bytes, step):
    whole, _ = batches_of(stored[0] / "raw", 2, 1, memory_bytes=memory_bytes)
    rest, _ = batches_of(stored[0] / "raw", 2, 1, step, memory_bytes=memory_bytes)
    assert len(rest) == len(whole) - step
    for (images, labels), (same_images, same_labels) in zip(whole[step:], rest, strict=True):
        np.testing.assert_array_equal(images, same_images)
        np.testing.assert_array_equal(labels, same_labels)


def test_a_batch_larger_than_any_window(stored):
    train = TRAIN.model_copy(update={"batch_size": 600, "shuffle_row_groups": 1})
    made, steps = batches_of(stored[0] / "png", 1, 0, train=train, memory_bytes=0)
    assert (steps, len(made)) == (1, 3)
    shares = np.bincount(np.concatenate([labels for _, labels in made])) / 1800
    assert np.abs(shares - 1 / 3).max() < 0.1


def test_labels_that_are_not_those_of_the_manifest(tmp_path):
    write_dataset(str(tmp_path), SHARDS, labels=LONG_TAIL)
    manifest = load_manifest(str(tmp_path))
    assert train_labels(str(tmp_path), manifest, ReaderSettings()).tolist() == LONG_TAIL.tolist()
    split = manifest.split("train").model_copy(update={"label_counts": (609, 62, 19)})
    with pytest.raises(DatasetError, match=r"labels of split 'train' count \[610, 61, 19\], the manifest says \[609, "):
        train_labels(str(tmp_path), manifest.model_copy(update={"splits": {"train": split}}), ReaderSettings())


def test_petastorm_knows_no_lanes(tmp_path):
    write_dataset(str(tmp_path), SHARDS, labels=LONG_TAIL)
    with pytest.raises(ValueError, match=r"train\.sampling balanced needs reader\.kind arrow"):
        check_data(load_manifest(str(tmp_path)), TRAIN, ReaderSettings(kind="petastorm"), 1)
