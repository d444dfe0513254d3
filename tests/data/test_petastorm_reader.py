import threading

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.data import petastorm_reader
from pipeline.data.manifest import DatasetError, Image, Manifest, Shard, Split

SHARD_ROWS = (200, 187, 43, 8, 195)
GROUP = 30
SIZE = 4


def manifest_of(shards, shape, encoding="raw"):
    """Only what a reader of batches asks a manifest for."""
    split = Split.model_construct(rows=sum(shard.rows for shard in shards), shards=tuple(shards))
    return Manifest.model_construct(
        name="numbers",
        image=Image(encoding=encoding, shape=shape),
        splits={"train": split},
        classes=tuple("0123456789"),
    )


def make_dataset(folder, shard_rows=SHARD_ROWS, group=GROUP):
    """Shards whose image i holds its own row number; the manifest that lists them."""
    shards, number = [], 0
    (folder / "train").mkdir(parents=True)
    for index, rows in enumerate(shard_rows):
        ids = np.arange(number, number + rows)
        images = np.zeros((rows, SIZE * SIZE), np.uint8)
        images[:, :4] = ids.astype(np.uint32)[:, None].view(np.uint8)
        columns = {
            "id": pa.array(ids, pa.int64()),
            "label": pa.array(label_of(ids), pa.int32()),
            "image": pa.array([row.tobytes() for row in images], pa.binary()),
        }
        path = f"train/part-{index:05}.parquet"
        pq.write_table(pa.table(columns), folder / path, row_group_size=group)
        groups = tuple(min(group, rows - start) for start in range(0, rows, group))
        shards.append(Shard(path=path, rows=rows, bytes=1, sha256="", row_groups=groups))
        number += rows
    return manifest_of(shards, (1, SIZE, SIZE))


def label_of(number):
    return np.asarray(number) * 7 % 10


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("petastorm") / "numbers"
    return str(folder), make_dataset(folder)


@pytest.fixture
def copy(tmp_path):
    return tmp_path / "copy", make_dataset(tmp_path / "copy")


def batches(dataset, *, rank=0, world_size=1, batch_size=24, seed=5, epoch=0, **kwargs):
    path, manifest = dataset
    settings = {"rank": rank, "world_size": world_size, "batch_size": batch_size, "seed": seed, "epoch": epoch}
    return petastorm_reader.train_batches(str(path), manifest, **settings, **kwargs)


def numbers(batch):
    """The row numbers that the images of a batch hold."""
    return batch.images.numpy().reshape(len(batch.images), -1)[:, :4].copy().view(np.uint32).ravel().tolist()


def rows_of(dataset, **kwargs):
    return [number for batch in batches(dataset, **kwargs) for number in numbers(batch)]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("batch_size", [24, 48])
def test_ranks_get_equal_steps_and_disjoint_rows(dataset, world_size, batch_size):
    steps = petastorm_reader.steps_per_epoch(dataset[1], batch_size=batch_size, world_size=world_size)
    for epoch in range(3):
        seen = []
        for rank in range(world_size):
            mine = list(batches(dataset, rank=rank, world_size=world_size, batch_size=batch_size, epoch=epoch))
            assert len(mine) == steps
            for batch in mine:
                assert batch.images.shape == (batch_size // world_size, 1, SIZE, SIZE)
                assert batch.images.dtype == torch.uint8
                assert batch.images.is_contiguous()
                assert batch.labels.dtype == torch.int64
                np.testing.assert_array_equal(batch.labels.numpy(), label_of(numbers(batch)))
                seen += numbers(batch)
        assert len(seen) == len(set(seen)) == steps * batch_size


def test_the_order_is_repeatable_and_differs_by_seed_epoch_and_rank(dataset):
    first = rows_of(dataset)
    assert rows_of(dataset) == first
    for other in ({"seed": 6}, {"epoch": 1}):
        assert rows_of(dataset, **other) != first
    parts = [rows_of(dataset, rank=rank, world_size=2) for rank in (0, 1)]
    assert not set(parts[0]) & set(parts[1])


def test_rows_are_shuffled_over_a_window_of_row_groups(dataset):
    first = rows_of(dataset)[:24]
    assert first != sorted(first)
    # 24 rows out of four row groups come from more than one of them; out of one, from one.
    assert len({number // GROUP for number in first}) > 2
    assert max(rows_of(dataset, shuffle_row_groups=1)[:8]) - min(rows_of(dataset, shuffle_row_groups=1)[:8]) < GROUP


def test_every_epoch_deals_anew(dataset):
    """Rank 0 of 2 meets nearly every row within a few epochs, and half of them in each."""
    epochs = [set(rows_of(dataset, world_size=2, epoch=epoch)) for epoch in range(8)]
    assert len(set.union(*epochs)) > 0.95 * sum(SHARD_ROWS)
    assert all(len(epoch) <= sum(SHARD_ROWS) / 2 for epoch in epochs)


def test_starting_in_the_middle_gives_the_rest(dataset):
    whole = list(batches(dataset, rank=1, world_size=2))
    rest = list(batches(dataset, rank=1, world_size=2, first_step=7))
    assert len(rest) == len(whole) - 7 > 0
    for a, b in zip(whole[7:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8, 16])
def test_the_arithmetic_holds_for_every_deal(world_size):
    """Row groups of any sizes: no deal leaves a rank with fewer rows than the steps want."""
    for seed in range(50):
        group_rows = np.random.default_rng([seed, world_size]).integers(1, 60, 16 + seed)
        shard = Shard(path="train/a", rows=int(group_rows.sum()), bytes=1, sha256="", row_groups=tuple(group_rows))
        made = manifest_of([shard], (1, 1, 1))
        steps = petastorm_reader.steps_per_epoch(made, batch_size=world_size, world_size=world_size)
        dealt = petastorm_reader.deal_row_groups(group_rows, world_size=world_size, seed=seed, epoch=1)
        assert dealt.shape == (len(group_rows) // world_size, world_size)
        assert len(np.unique(dealt)) == dealt.size
        assert group_rows[dealt].sum(axis=0).min() >= steps


def test_equal_row_groups_lose_nothing(tmp_path):
    even = tmp_path / "even", make_dataset(tmp_path / "even", shard_rows=(120, 120), group=30)
    assert petastorm_reader.steps_per_epoch(even[1], batch_size=24, world_size=4) == 10
    parts = [rows_of(even, rank=rank, world_size=4) for rank in range(4)]
    assert sorted(row for part in parts for row in part) == list(range(240))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world_size": 5}, r"train\.batch_size 24 is not a multiple of workers\.count 5"),
        (
            {"world_size": 48, "batch_size": 96},
            r"24 row groups are too few for 48 workers.*workers\.count.*row_group_rows",
        ),
        ({"batch_size": 4000}, r"less than its 4000 rows.*train\.batch_size \(4000\).*workers\.count.*row_group_rows"),
    ],
)
def test_settings_that_cannot_work_are_named_before_anything_is_read(dataset, tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        next(batches((tmp_path / "nowhere", dataset[1]), **settings))


def test_only_listed_files_are_opened(copy):
    (copy[0] / "train" / "part-00000-copy.parquet").write_bytes(b"what a failed task left")
    (copy[0] / "train" / "_common_metadata").write_bytes(b"not Parquet either")
    assert len(rows_of(copy)) == 24 * petastorm_reader.steps_per_epoch(copy[1], batch_size=24, world_size=1)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("shard", [0, 1])
@pytest.mark.parametrize(
    "damage", ["missing", "cut", "not parquet", "other rows", "other size", "null", "no column", "label"]
)
def test_a_damaged_shard_is_named(copy, shard, damage):
    path = sorted((copy[0] / "train").iterdir())[shard]
    table = pq.read_table(path)
    reason = "cannot be read"
    if damage == "missing":
        path.unlink()
        reason = "is missing"
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "not parquet":
        path.write_bytes(b"x" * 5000)
    elif damage == "other rows":
        pq.write_table(table, path, row_group_size=29)
        reason = r"has \d+ rows, the manifest says \d+"
    elif damage == "no column":
        pq.write_table(table.drop_columns(["label"]), path, row_group_size=GROUP)
        reason = ".*has no column label"
    elif damage == "label":
        labels = pa.array([10, *table["label"].to_pylist()[1:]], pa.int32())
        pq.write_table(table.set_column(1, "label", labels), path, row_group_size=GROUP)
        reason = "row 0 has label 10, but the dataset has 10 classes, 0 to 9"
    else:
        images = table["image"].to_pylist()
        images[0] = images[0][:-1] if damage == "other size" else None
        reason = "an image is not 16 bytes" if damage == "other size" else "an image is null"
        pq.write_table(table.set_column(2, "image", pa.array(images, pa.binary())), path, row_group_size=GROUP)
    with pytest.raises(DatasetError, match=rf"{path.name}, row group \d: {reason}"):
        list(batches(copy))
    assert not petastorm_threads()


def petastorm_threads():
    return [thread for thread in threading.enumerate() if type(thread).__module__.startswith("petastorm")]


def test_leaving_early_stops_petastorm(dataset):
    iterator = batches(dataset)
    next(iterator)
    assert petastorm_threads()
    iterator.close()
    assert not petastorm_threads()


def test_a_dataset_behind_fsspec(dataset):
    memory = fsspec.filesystem("memory")
    memory.put(dataset[0], "/petastorm-reader/numbers", recursive=True)
    try:
        assert rows_of(("memory://petastorm-reader/numbers", dataset[1])) == rows_of(dataset)
    finally:
        memory.rm("/petastorm-reader", recursive=True)


def test_encoded_images_are_decoded(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(1).integers(0, 256, (8, SIZE, SIZE), dtype=np.uint8)
    payloads = []
    for each in pixels:
        image.fromarray(each).save(tmp_path / "one.png")
        payloads.append((tmp_path / "one.png").read_bytes())
    table = pa.table(
        {"id": range(8), "label": pa.array(range(8), pa.int32()), "image": pa.array(payloads, pa.binary())}
    )
    (tmp_path / "train").mkdir()
    pq.write_table(table, tmp_path / "train" / "a.parquet", row_group_size=4)
    shard = Shard(path="train/a.parquet", rows=8, bytes=1, sha256="", row_groups=(4, 4))
    made = manifest_of([shard], (1, SIZE, SIZE), encoding="png")
    (batch,) = batches((tmp_path, made), batch_size=8)
    np.testing.assert_array_equal(batch.images.numpy()[:, 0], pixels[batch.labels.numpy()])
    payloads[2] = payloads[2][:30]
    pq.write_table(table.set_column(2, "image", pa.array(payloads)), tmp_path / shard.path, row_group_size=4)
    with pytest.raises(DatasetError, match=r"a\.parquet, row group 0: "):
        list(batches((tmp_path, made), batch_size=8))
