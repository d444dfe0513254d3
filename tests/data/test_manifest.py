import numpy as np
import pytest
from small_manifests import make

from pipeline.data import manifest, versions
from pipeline.data.manifest import DatasetError, Image, Shard


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
