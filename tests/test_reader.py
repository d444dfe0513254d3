import shutil
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline import manifest, plan, reader
from pipeline.manifest import DatasetError
from pipeline.shards import SplitFiles


@pytest.fixture(scope="module")
def content(dataset):
    """All rows of the training split in the manifest's order: images, labels."""
    shards = manifest.load(dataset).split("train").shards
    table = pa.concat_tables([pq.read_table(f"{dataset}/{shard.path}") for shard in shards])
    images = np.stack([np.frombuffer(image, np.uint8) for image in table["image"].to_pylist()])
    return images.reshape(-1, 1, 12, 12), table["label"].to_numpy()


def files_of(dataset, split="train"):
    return SplitFiles(dataset, manifest.load(dataset), split)


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
    table = pq.read_table([f"{dataset}/{s.path}" for s in manifest.load(dataset).split("test").shards])
    images = torch.cat([part.images for part in parts])
    assert [image.numpy().tobytes() for image in images] == table["image"].to_pylist()
    assert torch.cat([part.labels for part in parts]).tolist() == table["label"].to_pylist()


@pytest.fixture
def copy(dataset, tmp_path):
    shutil.copytree(dataset, tmp_path / "copy")
    return tmp_path / "copy"


def read_all(path):
    files = files_of(str(path))
    return [files.read(number) for number in range(len(files.group_rows))]


@pytest.mark.parametrize("damage", ["missing", "cut", "not parquet"])
def test_a_damaged_shard_is_named(copy, damage):
    shard = copy / manifest.load(str(copy)).split("train").shards[1].path
    if damage == "missing":
        shard.unlink()
    elif damage == "cut":
        shard.write_bytes(shard.read_bytes()[:-500])
    else:
        shard.write_bytes(b"x" * 5000)
    with pytest.raises(DatasetError, match=rf"{shard.name}, row group 0: (is missing|cannot be read)"):
        read_all(copy)


def test_a_shard_with_images_of_another_size_is_named(copy):
    shard = copy / manifest.load(str(copy)).split("train").shards[0].path
    table = pq.read_table(shard)
    short = pa.array([image[:-1] for image in table["image"].to_pylist()], pa.binary())
    pq.write_table(table.set_column(2, "image", short), shard, row_group_size=30)
    with pytest.raises(DatasetError, match=rf"{shard.name}, row group 0: an image is not 144 bytes"):
        read_all(copy)


def test_a_shard_with_other_rows_than_the_manifest_says_is_named(copy):
    shard = copy / manifest.load(str(copy)).split("train").shards[0].path
    pq.write_table(pq.read_table(shard), shard, row_group_size=29)
    with pytest.raises(DatasetError, match=rf"{shard.name}, row group 0: has 29 rows, the manifest says 30"):
        read_all(copy)


def test_prefetch_keeps_order_and_stays_bounded():
    made = []

    def items():
        for number in range(50):
            made.append(number)
            yield [number]

    with reader.Prefetch(items(), depth=3) as ready:
        assert next(ready) == 0
        time.sleep(0.3)
        assert len(made) <= 6
        assert list(ready) == list(range(1, 50))


def test_prefetch_raises_what_its_items_raise():
    def items():
        yield [1]
        raise DatasetError("row group 3 is cut")

    with reader.Prefetch(items()) as ready:
        assert next(ready) == 1
        with pytest.raises(DatasetError, match="row group 3 is cut"):
            next(ready)


def test_prefetch_stops_its_thread_when_left_early():
    with reader.Prefetch(([number] for number in range(10**9)), depth=2) as ready:
        next(ready)
    assert not [t for t in threading.enumerate() if t.name == "sparknorm-prefetch"]
