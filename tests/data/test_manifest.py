import json

import numpy as np
import pytest

from pipeline import storage
from pipeline.data import load_manifest, manifest
from pipeline.data.manifest import DatasetError, Image, Ingested, Manifest, Shard, Split


def make(rows=10, aside=2, input_rows=12, groups=(6, 4), counts=(7, 3)) -> Manifest:
    shard = Shard(path="train/part-0.parquet", rows=rows, bytes=100, sha256="00", row_groups=groups)
    split = Split(rows=rows, label_counts=counts, pixel_sums=((9,), (81,)), mean=(0.5,), std=(0.25,), shards=(shard,))
    return Manifest(
        name="x",
        settings_digest="sha256:0",
        spark_application="local-1",
        image=Image(encoding="raw", shape=(1, 4, 4)),
        classes=("a", "b"),
        input_rows=input_rows,
        set_aside={"wrong_size": aside} if aside else {},
        sources=(Ingested(settings_digest="sha256:0", state="sha256:1", rows=input_rows),),
        splits={"train": split},
    )


def test_published_and_loaded_are_equal(tmp_path):
    sealed = manifest.publish(str(tmp_path), make())
    assert load_manifest(str(tmp_path)) == sealed
    assert sealed.digest.startswith("sha256:")


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
        manifest.publish(str(tmp_path), make(**change))
    assert list(tmp_path.iterdir()) == []


def test_the_digest_covers_content_and_not_the_job():
    sealed = manifest.seal(make())
    again = manifest.seal(sealed.model_copy(update={"spark_application": "local-2"}))
    later = sealed.sources[0].model_copy(update={"state": "sha256:2"})
    assert manifest.seal(sealed.model_copy(update={"sources": (later,)})).digest == sealed.digest
    other = manifest.seal(sealed.model_copy(update={"classes": ("a", "c")}))
    assert again.digest == sealed.digest != other.digest


def test_what_is_wrong_with_a_manifest_is_said(tmp_path):
    with pytest.raises(DatasetError, match="no dataset here"):
        load_manifest(str(tmp_path))
    path = tmp_path / manifest.FILE_NAME
    for text, message in (
        ("{", "not JSON"),
        ("[]", "format 1"),
        ('{"format": 2}', "format 1"),
        ('{"format": 1}', "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=message) as error:
            load_manifest(str(tmp_path))
        assert "\n" not in str(error.value)
    manifest.publish(str(tmp_path), make())
    whole = path.read_text()
    for change, message in (
        ({"mean": [0.6]}, "its content does not match its digest"),
        ({"rows": 11}, r"manifest\.json was altered: split train: 11 rows, but its shards hold 10"),
        ({"rows": "many"}, r"manifest\.json is damaged, .*: splits\.train\.rows: Input should be a valid integer"),
    ):
        tree = json.loads(whole)
        tree["splits"]["train"] |= change
        path.write_text(json.dumps(tree))
        with pytest.raises(DatasetError, match=message) as error:
            load_manifest(str(tmp_path))
        assert "\n" not in str(error.value)


def test_an_earlier_version_stays_readable(tmp_path):
    first = manifest.publish(str(tmp_path), make())
    added = make().model_copy(update={"splits": {}, "input_rows": 2})  # nothing but rows that were set aside
    second = manifest.publish(str(tmp_path), manifest.next_version(first, added), before=first)
    assert (second.version, second.previous, second.input_rows) == (2, first.digest, 14)
    assert second.set_aside == {"wrong_size": 4}
    assert second.split("train").rows == 10
    assert [load_manifest(str(tmp_path), version) for version in (None, 1, 2)] == [second, first, second]
    for version in (0, 3):
        with pytest.raises(DatasetError, match=rf"has versions 1 to 2; dataset\.version is {version}"):
            load_manifest(str(tmp_path), version)


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


def test_a_manifest_on_an_object_store():
    sealed = manifest.publish("memory://bucket/data", make())
    assert load_manifest("memory://bucket/data") == sealed
    storage.remove("memory://bucket")
