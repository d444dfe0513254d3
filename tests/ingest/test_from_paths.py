"""Shuffling names of files gives the dataset that shuffling images gives, byte for byte."""

import hashlib
from pathlib import Path

import pytest
from image_files import folder_settings, rows_of, set_aside, write_folder, write_picture

from pipeline.ingest import transform
from pipeline.ingest.job import ingest_dataset


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with splits, of good files and of four that cannot be used."""
    root = tmp_path_factory.mktemp("pictures")
    for split, count, first in (("train", 60, 0), ("test", 30, 100)):
        write_folder(root / split, count, first)
    for number in range(200, 230):
        write_picture(root / "train" / "cat" / f"{number}.jpg", number, "JPEG", height=20 + number % 7, width=40)
    whole = (root / "train" / "dog" / "1.png").read_bytes()
    for name, content in (("text", b"no image"), ("cut", whole[:90]), ("empty", b"")):
        (root / "train" / "dog" / f"{name}.png").write_bytes(content)
    write_picture(root / "elsewhere" / "cat" / "1.png", 1)
    return root


def files_of(dataset: Path) -> dict[str, str]:
    return {
        str(path.relative_to(dataset)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in dataset.rglob("*.parquet")
    }


CASES = {
    "splits by hash": {},
    "splits of the folder": {"source": {"split_folders": True}},
    "one class": {"source": {"split_folders": True, "classes": ["dog"]}},
    "JPEG": {"image": {"encoding": "jpeg", "resize": "letterbox", "shape": [3, 24, 24]}},
}


@pytest.mark.parametrize("case", CASES)
def test_both_ways_give_the_same_bytes(spark, pictures, tmp_path, monkeypatch, case):
    ways = []
    chosen = transform._shuffles_paths

    def choose(*arguments):
        ways.append(chosen(*arguments))
        return ways[-1]

    monkeypatch.setattr(transform, "_shuffles_paths", choose)
    more = {"shard_bytes": 1500, "max_bad_share": 0.9, **CASES[case]}
    by_paths, _ = ingest_dataset(spark, folder_settings(tmp_path / "paths", pictures, **more), cache="unused")
    monkeypatch.setattr(transform, "_shuffles_paths", lambda *_: False)
    by_images, _ = ingest_dataset(spark, folder_settings(tmp_path / "images", pictures, **more), cache="unused")
    assert ways == [True]
    assert by_paths.digest == by_images.digest
    assert files_of(tmp_path / "paths") == files_of(tmp_path / "images")
    assert set_aside(tmp_path / "paths") == set_aside(tmp_path / "images")
    rows = rows_of(tmp_path / "paths")
    assert len(rows) + len(set_aside(tmp_path / "paths")) == by_paths.input_rows == 124
    assert len(set_aside(tmp_path / "paths")) == sum(by_paths.set_aside.values()) >= 3


def test_what_is_appended_is_the_same(spark, tmp_path, monkeypatch):
    digests = []
    for way, choose in (("paths", transform._shuffles_paths), ("images", lambda *_: False)):
        monkeypatch.setattr(transform, "_shuffles_paths", choose)
        folder = write_folder(tmp_path / way / "in", 60)
        settings = folder_settings(tmp_path / way / "data", folder, shard_bytes=1500)
        ingest_dataset(spark, settings, cache="unused")
        write_folder(folder, 40, first=60)
        found, _ = ingest_dataset(spark, settings.model_copy(update={"append": True}), cache="unused")
        assert found.input_rows == 100
        digests.append((found.digest, files_of(tmp_path / way / "data")))
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "changes", [{"deduplicate": True}, {"source": {"expand": 2}}, {"shard_bytes": 1 << 20}], ids=lambda c: next(iter(c))
)
def test_images_are_shuffled_where_paths_would_not_do(spark, tmp_path, monkeypatch, changes):
    """Content decides, or an image goes to several shards, or shards are too few for the cores."""
    monkeypatch.setattr(transform, "_plan_of_paths", lambda *_: pytest.fail("paths were shuffled"))
    settings = folder_settings(tmp_path / "data", write_folder(tmp_path / "in", 60), **{"shard_bytes": 1500, **changes})
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert sum(split.rows for split in found.splits.values()) >= 60
