import json

import pytest

from pipeline import manifest, storage
from pipeline.manifest import DatasetError, Image, Ingested, Manifest, Shard, Split


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
    assert manifest.load(str(tmp_path)) == sealed
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
        manifest.load(str(tmp_path))
    path = tmp_path / manifest.FILE_NAME
    for text, message in (
        ("{", "not JSON"),
        ("[]", "format 1"),
        ('{"format": 2}', "format 1"),
        ('{"format": 1}', "damaged"),
    ):
        path.write_text(text)
        with pytest.raises(DatasetError, match=message):
            manifest.load(str(tmp_path))
    manifest.publish(str(tmp_path), make())
    tree = json.loads(path.read_text())
    tree["splits"]["train"]["mean"] = [0.6]
    path.write_text(json.dumps(tree))
    with pytest.raises(DatasetError, match="was altered"):
        manifest.load(str(tmp_path))


def test_an_unknown_split_lists_the_known():
    with pytest.raises(DatasetError, match="no split 'tset'; it has train"):
        make().split("tset")


def test_a_manifest_on_an_object_store():
    sealed = manifest.publish("memory://bucket/data", make())
    assert manifest.load("memory://bucket/data") == sealed
    storage.remove("memory://bucket")
