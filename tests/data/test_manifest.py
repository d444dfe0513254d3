import tracemalloc

import numpy as np
import pytest
from small_manifests import make

from pipeline.config.training import TrainSettings
from pipeline.data import manifest, versions
from pipeline.data.loader import plan_of
from pipeline.data.manifest import DatasetError, Image, Shard
from pipeline.data.shards import SplitFiles


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_rows": 13}, "13 came in, 10 are in splits and 2 set aside"),
        ({"aside": 3}, "12 came in, 10 are in splits and 3 set aside"),
        ({"groups": (6, 3)}, "their row groups 9"),
        ({"counts": (7, 4)}, "label counts add up to 11"),
    ],
)
def test_rows_are_conserved_or_nothing_is_published(tmp_path, change, message):
    with pytest.raises(DatasetError, match=message):
        versions.publish(str(tmp_path), make(**change))
    assert list(tmp_path.iterdir()) == []


def test_the_digest_covers_content_and_not_the_job():
    sealed = manifest.seal(make())
    again = manifest.seal(sealed.model_copy(update={"spark_application": "local-2"}))
    later = sealed.sources[0].model_copy(update={"state": "sha256:2"})
    assert manifest.seal(sealed.model_copy(update={"sources": (later,)})).digest == sealed.digest
    other = manifest.seal(sealed.model_copy(update={"classes": ("a", "c")}))
    assert again.digest == sealed.digest != other.digest


def test_statistics_of_joined_splits_are_those_of_all_pixels():
    pixels = [np.random.default_rng(seed).integers(0, 256, (rows, 3, 4, 5)) for seed, rows in ((1, 7), (2, 30))]

    def split(images):
        sums = [images.sum((0, 2, 3)).tolist(), (images**2).sum((0, 2, 3)).tolist()]
        shard = Shard(path="train/x.parquet", rows=len(images), bytes=1, sha256="00", row_groups=(len(images),))
        return manifest.with_statistics([len(images), 0], sums, (shard,), (3, 4, 5))

    parts = [
        make().model_copy(update={"image": Image(encoding="raw", shape=(3, 4, 5)), "splits": {"train": split(images)}})
        for images in pixels
    ]
    joined = manifest.next_version(*parts).split("train")
    values = np.concatenate(pixels) / 255
    np.testing.assert_allclose(joined.mean, values.mean((0, 2, 3)), rtol=1e-13)
    np.testing.assert_allclose(joined.std, values.std((0, 2, 3)), rtol=1e-10)
    assert (joined.rows, joined.label_counts) == (37, (37, 0))


def test_an_unknown_split_lists_the_known():
    with pytest.raises(DatasetError, match="no split 'tset'; it has train"):
        make().split("tset")


def test_row_groups_are_numbered_through_all_shards():
    shards = [
        manifest.Shard(path=str(number), rows=sum(rows), bytes=1, sha256="", row_groups=rows)
        for number, rows in enumerate([(3, 4), (), (5,), (6, 7, 8)])
    ]
    groups = manifest.RowGroups(shards)
    listed = [(shard, number) for shard in shards for number in range(len(shard.row_groups))]
    assert list(groups) == [groups[index] for index in range(len(groups))] == listed
    assert (groups[-1].rows, groups[2:4], len(groups)) == (8, listed[2:4], 6)
    assert len(manifest.RowGroups([])) == 0
    for beyond in (6, -7):
        with pytest.raises(IndexError):
            groups[beyond]


def test_a_million_row_groups_take_little_memory_to_plan():
    """What each rank makes of a manifest of a billion rows: not an object for each row group."""
    shards = tuple(
        manifest.Shard(path=str(number), rows=100_000, bytes=1, sha256="", row_groups=(1000,) * 100)
        for number in range(10_000)
    )
    split = manifest.with_statistics([500_000_000] * 2, [[1], [1]], shards, (1, 2, 2))
    made = manifest.Manifest(
        name="made", settings_digest="", spark_application="", classes=("a", "b"), input_rows=10**9, set_aside={},
        sources=(), splits={"train": split}, image=manifest.Image(encoding="raw", shape=(1, 2, 2)),
    )  # fmt: skip
    tracemalloc.start()
    try:
        files = SplitFiles("nowhere", made, "train")
        plan = plan_of(made, TrainSettings(epochs=1, batch_size=1024), epoch=0)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(files.row_groups), plan.steps, int(files.group_rows.sum())) == (10**6, 10**9 // 1024, 10**9)
    assert kept < 40 * 10**6  # four arrays of a million int64
    assert most < 60 * 10**6


def test_how_images_were_made_is_no_part_of_the_digest():
    """Of the same input and settings a version that did not write it down made the same dataset."""
    made = manifest.Preparation(
        resize="crop", background=255, max_pixels=9, jpeg_quality=92, formats=("PNG",), max_bytes=9
    )
    silent = manifest.seal(make())
    assert manifest.seal(make().model_copy(update={"preparation": made})).digest == silent.digest
    content = silent.model_dump(mode="json")
    del content["preparation"]
    assert manifest.Manifest.model_validate(content) == silent
