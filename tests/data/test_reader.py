import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_shards import change_shard, open_files, write_dataset

from pipeline.data import load_manifest, plan, pool, reader
from pipeline.data.manifest import DatasetError
from pipeline.data.prefetch import Prefetch
from pipeline.data.shards import SplitFiles


@pytest.fixture(scope="module")
def content(dataset):
    """All rows of the training split in the manifest's order: images, labels."""
    shards = load_manifest(dataset).split("train").shards
    table = pa.concat_tables([pq.read_table(f"{dataset}/{shard.path}") for shard in shards])
    images = np.stack([np.frombuffer(image, np.uint8) for image in table["image"].to_pylist()])
    return images.reshape(-1, 1, 12, 12), table["label"].to_numpy()


def files_of(dataset, split="train"):
    return SplitFiles(dataset, load_manifest(dataset), split)


def epoch_plan(files, lanes=4, batch_size=32, window=2, epoch=0):
    return plan.plan_epoch(
        files.group_rows, lanes=lanes, batch_size=batch_size, shuffle_row_groups=window, seed=5, epoch=epoch
    )


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [4, 32, 100])
def test_batches_are_what_the_plan_says(dataset, content, world_size, batch_size):
    files = files_of(dataset)
    planned = epoch_plan(files, batch_size=batch_size)
    expected = plan.step_rows(planned)
    for rank in range(world_size):
        lanes = plan.rank_lanes(rank, world_size, 4)
        batches = list(reader.train_batches(files, lambda _: planned, lanes, epochs=1))
        assert len(batches) == planned.steps
        for batch, rows in zip(batches, expected, strict=True):
            mine = rows[list(lanes)].ravel()
            assert batch.images.dtype == torch.uint8
            np.testing.assert_array_equal(batch.images.numpy(), content[0][mine])
            np.testing.assert_array_equal(batch.labels.numpy(), content[1][mine])
    files.close()


def test_starting_in_the_middle_gives_the_rest(dataset):
    files = files_of(dataset)
    planned = epoch_plan(files)
    whole = list(reader.train_batches(files, lambda _: planned, range(4), epochs=1))
    rest = list(reader.train_batches(files, lambda _: planned, range(4), epochs=1, first_step=10))
    assert len(rest) == planned.steps - 10
    for a, b in zip(whole[10:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_reads_every_row_once(dataset, world_size):
    files = files_of(dataset, "test")
    parts = [
        batch
        for rank in range(world_size)
        for block in reader.evaluation_blocks(files, rank=rank, world_size=world_size, batch_size=13)
        for batch in block
    ]
    table = pq.read_table([f"{dataset}/{s.path}" for s in load_manifest(dataset).split("test").shards])
    images = torch.cat([part.images for part in parts])
    assert [image.numpy().tobytes() for image in images] == table["image"].to_pylist()
    assert torch.cat([part.labels for part in parts]).tolist() == table["label"].to_pylist()
    ids = [reader.evaluation_ids(files, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert np.concatenate(ids).tolist() == table["id"].to_pylist()


STREAMING, RESIDENT = {"memory_bytes": 0}, {"memory_bytes": 1 << 30}
SHARDS = (251, 300, 120, 7)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Paths of one split, stored raw and as PNG, and its images and labels."""
    folder = tmp_path_factory.mktemp("small")
    content = write_dataset(f"{folder}/raw", SHARDS, row_group_rows=25)
    write_dataset(f"{folder}/png", SHARDS, row_group_rows=25, encoding="png")
    return {"raw": f"{folder}/raw", "png": f"{folder}/png"}, content


def running_threads():
    """Those of the reader alone: a tracked run of another test may still be taking its last sample."""
    ours = ("sparknorm-reader", "sparknorm-prefetch")
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)]


def plans(files, **options):
    return lambda epoch: epoch_plan(files, epoch=epoch, **options)


@pytest.mark.parametrize("memory", [STREAMING, RESIDENT], ids=["streaming", "resident"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("batch_size", [4, 32, 128, 600])
def test_many_epochs_in_one_go_are_what_their_plans_say(small, memory, world_size, encoding, batch_size):
    """600: a lane's part of a batch is larger than the largest window, so that each load has several."""
    files = open_files(small[0][encoding], **memory)
    assert pool.is_resident(files) is (memory is RESIDENT)
    plan_of = plans(files, batch_size=batch_size)
    for rank in range(world_size):
        lanes = plan.rank_lanes(rank, world_size, 4)
        batches = reader.train_batches(files, plan_of, lanes, epochs=4, first_epoch=1)
        for epoch in (1, 2, 3):
            for rows in plan.step_rows(plan_of(epoch)):
                batch, mine = next(batches), rows[list(lanes)].ravel()
                np.testing.assert_array_equal(batch.images.numpy(), small[1][0][mine])
                np.testing.assert_array_equal(batch.labels.numpy(), small[1][1][mine])
        assert next(batches, None) is None
    assert not running_threads()


def test_batches_stay_what_they_are_while_later_ones_are_made(small):
    files = open_files(small[0]["raw"], **STREAMING)
    plan_of = plans(files)
    batches = list(reader.train_batches(files, plan_of, range(4), epochs=3))
    rows = np.concatenate([plan.step_rows(plan_of(epoch)) for epoch in range(3)]).reshape(len(batches), -1)
    for batch, mine in zip(batches, rows, strict=True):
        np.testing.assert_array_equal(batch.images.numpy(), small[1][0][mine])


@pytest.mark.parametrize("memory", [STREAMING, RESIDENT], ids=["streaming", "resident"])
@pytest.mark.parametrize("window", [1, 3, 100])
@pytest.mark.parametrize("batch_size", [8, 32, 200])
def test_any_step_of_any_epoch_can_be_the_first(small, memory, window, batch_size):
    files = open_files(small[0]["raw"], **memory)
    plan_of = plans(files, batch_size=batch_size, window=window)
    steps = plan_of(0).steps
    rows = np.concatenate([plan.step_rows(plan_of(epoch)) for epoch in (1, 2)]).reshape(2 * steps, 4, -1)
    for first_step in {1, steps // 2, steps - 1}:
        batches = list(
            reader.train_batches(files, plan_of, range(1, 4, 2), epochs=3, first_epoch=1, first_step=first_step)
        )
        assert len(batches) == 2 * steps - first_step
        for batch, all_rows in zip(batches, rows[first_step:], strict=True):
            np.testing.assert_array_equal(batch.images.numpy(), small[1][0][all_rows[[1, 3]].ravel()])


@pytest.mark.parametrize("encoding", ["raw", "png"])
@pytest.mark.parametrize("options", [{}, {"threads": 1}, {"threads": 7, "prefetch_batches": 1}])
def test_blocks_are_the_same_batches(small, encoding, options):
    files = open_files(small[0][encoding], **STREAMING, **options)
    one_by_one = list(reader.train_batches(files, plans(files, batch_size=8), range(4), epochs=2))
    blocks = list(reader.train_blocks(files, plans(files, batch_size=8), range(4), epochs=2))
    # Raw images are gathered as they are asked for; images to decode are made ahead, several at once.
    together = 1 if encoding == "raw" else max(1, files.settings.prefetch_batches // 2)
    assert max(len(block) for block in blocks) == together
    for a, b in zip(one_by_one, (batch for block in blocks for batch in block), strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("memory", [STREAMING, RESIDENT], ids=["streaming", "resident"])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_leaving_early_stops_all_threads(small, memory, depth, encoding):
    files = open_files(small[0][encoding], **memory)
    blocks = reader.train_blocks(files, plans(files), range(4), epochs=1000)
    with Prefetch(blocks, depth) as batches:
        taken = [next(batches) for _ in range(3)]
        assert running_threads()
    assert not running_threads()
    for batch, rows in zip(taken, plan.step_rows(plans(files)(0)), strict=False):
        np.testing.assert_array_equal(batch.images.numpy(), small[1][0][rows.ravel()])


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("memory", [STREAMING, RESIDENT], ids=["streaming", "resident"])
@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_an_error_in_a_loading_thread_reaches_the_consumer(tmp_path, memory, depth, encoding):
    write_dataset(str(tmp_path), (100,) * 4, encoding=encoding)
    files = open_files(str(tmp_path), **memory)
    shard = tmp_path / files.row_groups[-1].shard.path
    shard.write_bytes(shard.read_bytes()[:-1])
    start = time.monotonic()
    blocks = reader.train_blocks(files, plans(files), range(4), epochs=9)
    expected = pytest.raises(DatasetError, match=rf"{shard.name}, row group \d: is cut")
    with Prefetch(blocks, depth) as batches, expected:
        list(batches)
    assert time.monotonic() - start < 10
    assert not running_threads()


def test_a_damaged_stored_image_reaches_the_consumer(tmp_path):
    write_dataset(str(tmp_path), (100,) * 4, encoding="png")
    files = open_files(str(tmp_path))
    sink = pa.BufferOutputStream()
    table = pq.read_table(tmp_path / files.row_groups[0].shard.path)
    pq.write_table(table.set_column(2, "image", pa.array([b"no image"] * 100)), sink, row_group_size=30)
    name = change_shard(str(tmp_path), 0, sink.getvalue().to_pybytes())
    files = open_files(str(tmp_path))
    with pytest.raises(DatasetError, match=rf"{name}, row group \d: an image is damaged: undecodable"):
        list(reader.train_batches(files, plans(files), range(4), epochs=1))
    assert not running_threads()


def test_encoded_evaluation_batches_are_those_of_raw(small):
    for rank in range(3):
        raw, png = (
            [batch for block in reader.evaluation_blocks(open_files(small[0][encoding]), rank=rank, world_size=3,
                                                         batch_size=13) for batch in block]
            for encoding in ("raw", "png")
        )  # fmt: skip
        assert all(torch.equal(a.images, b.images) for a, b in zip(raw, png, strict=True))


def test_prefetch_keeps_order_and_stays_bounded():
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield [number]

    with Prefetch(items(), depth=3) as ready:
        assert next(ready) == 0
        time.sleep(0.3)
        assert len(made) <= 6
        assert list(ready) == list(range(1, 50))


def test_prefetch_raises_what_its_items_raise():
    def items():
        yield [1]
        raise DatasetError("row group 3 is cut")

    with Prefetch(items()) as ready:
        assert next(ready) == 1
        with pytest.raises(DatasetError, match="row group 3 is cut"):
            next(ready)


def test_prefetch_stops_its_thread_when_left_early():
    with Prefetch(([number] for number in range(10**9)), depth=2) as ready:
        next(ready)
    assert not [t for t in threading.enumerate() if t.name == "sparknorm-prefetch"]


@pytest.mark.parametrize("depth", [0, 1])
def test_prefetch_gives_all_items_and_then_ends(depth):
    with Prefetch(iter([[1, 2], [], [3]]), depth) as ready:
        assert list(ready) == [1, 2, 3]


def test_prefetch_of_depth_0_makes_what_is_asked_for_and_closes_its_blocks():
    made, closed = [], []

    def blocks():
        try:
            for number in range(10):
                made.append(number)
                yield [number]
        finally:
            closed.append(True)

    with Prefetch(blocks(), depth=0) as ready:
        assert [next(ready), next(ready)] == [0, 1]
        assert made == [0, 1]
        assert not running_threads()
    assert closed == [True]
