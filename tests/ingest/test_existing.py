"""Adding to a dataset: new versions of it, and what a job that died leaves."""

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from image_files import check_statistics, folder_settings, rows_of, stored, write_folder, write_picture
from small_data import CLASSES, dataset_settings, make_images, write_idx_folder

from pipeline import storage
from pipeline.config.dataset import SourceSettings
from pipeline.data import load_manifest
from pipeline.data.manifest import DatasetError
from pipeline.ingest import claim, existing
from pipeline.ingest.job import ingest_dataset

pytestmark = [pytest.mark.spark, pytest.mark.long]


def shards_of(folder: Path) -> dict[str, tuple[int, str]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in folder.rglob("*.parquet")
    }


def appended(settings, **changes):
    return settings.model_copy(update={"append": True, **changes})


@pytest.fixture(scope="module")
def ready(spark, tmp_path_factory):
    """``data``, a dataset of 30 pictures, and ``in``, its folder, which has got 12 more since."""
    path = tmp_path_factory.mktemp("ready")
    folder = write_folder(path / "in", 30)
    ingest_dataset(spark, folder_settings(path / "data", folder), cache="unused")
    write_folder(folder, 12, first=30)
    return path


@pytest.fixture(scope="module")
def undisturbed(spark, ready):
    """The folder of the dataset to which the 12 were added."""
    shutil.copytree(ready / "data", ready / "undisturbed")
    ingest_dataset(spark, appended(folder_settings(ready / "undisturbed", ready / "in")), cache="unused")
    return ready / "undisturbed"


@pytest.fixture
def grown(ready, tmp_path):
    """A copy of what is ready: the settings, and the manifest."""
    shutil.copytree(ready, tmp_path, dirs_exist_ok=True)
    return appended(folder_settings(tmp_path / "data", tmp_path / "in")), load_manifest(str(tmp_path / "data"))


def test_only_what_is_new_comes_in(spark, grown, tmp_path):
    settings, first = grown
    data = tmp_path / "data"
    old_rows, old_shards = rows_of(data), shards_of(data)
    second, written = ingest_dataset(spark, settings, cache="unused")
    assert written
    assert (second.version, second.previous, second.input_rows) == (2, first.digest, 42)
    assert [(source.rows, source.already_there) for source in second.sources] == [(30, 0), (12, 30)]
    assert shards_of(data).items() > old_shards.items()
    rows = rows_of(data)
    assert {key: rows[key] for key in old_rows} == old_rows
    assert {row["image"] for row in rows.values()} == {stored(number) for number in range(42)}
    check_statistics(data)
    assert load_manifest(str(data), 1) == first
    assert rows_of(data, version=1) == old_rows
    assert load_manifest(str(data), 2) == second


def test_appending_the_same_again_changes_nothing(spark, grown, tmp_path):
    settings, _ = grown
    second, _ = ingest_dataset(spark, settings, cache="unused")
    before = shards_of(tmp_path / "data")
    again, written = ingest_dataset(spark, settings, cache="unused")
    assert (again, written) == (second, False)
    assert shards_of(tmp_path / "data") == before


def test_it_does_not_matter_when_a_row_came(spark, ready, undisturbed, tmp_path):
    whole, _ = ingest_dataset(spark, folder_settings(tmp_path / "whole", ready / "in"), cache="unused")
    assert rows_of(tmp_path / "whole") == rows_of(undisturbed)
    for name, split in load_manifest(str(undisturbed)).splits.items():
        other = whole.split(name)
        np.testing.assert_array_equal([split.mean, split.std], [other.mean, other.std])
        assert (split.rows, split.label_counts, split.pixel_sums) == (other.rows, other.label_counts, other.pixel_sums)


def test_a_third_version_and_versions_that_are_not_there(spark, grown, tmp_path):
    settings, first = grown
    second, _ = ingest_dataset(spark, settings, cache="unused")
    write_picture(tmp_path / "in" / "cat" / "one more.png", 99)  # a single row is in one split, whichever it is
    third, _ = ingest_dataset(spark, settings, cache="unused")
    assert (third.version, third.previous, third.input_rows) == (3, second.digest, 43)
    assert [load_manifest(str(tmp_path / "data"), version) for version in (1, 2, 3)] == [first, second, third]
    with pytest.raises(DatasetError, match=r"has versions 1 to 3; dataset\.version is 4"):
        load_manifest(str(tmp_path / "data"), 4)
    (tmp_path / "data" / "manifest-0002.json").unlink()
    with pytest.raises(DatasetError, match=r"version 2 cannot be read, manifest-0002\.json is missing"):
        load_manifest(str(tmp_path / "data"), 2)


class KilledError(Exception):
    pass


def dies_at(monkeypatch, name: str, *, done: bool):
    """The driver dies when it writes the file of this name, before or after it is there."""

    def dying(write):
        def call(path, *args, **options):
            if path.endswith(f"/{name}") and not done:
                raise KilledError
            written = write(path, *args, **options)
            if path.endswith(f"/{name}"):
                raise KilledError
            return written

        return call

    monkeypatch.setattr(storage, "publish", dying(storage.publish))
    monkeypatch.setattr(storage, "create", dying(storage.create))


def is_killed(monkeypatch):
    """Nothing is cleaned up, and the claim is neither renewed nor released."""
    monkeypatch.setattr(claim, "LEASE_SECONDS", 0.5)
    monkeypatch.setattr(existing, "clean_up", lambda *_: None)
    monkeypatch.setattr(claim.Claim, "release", lambda held: held._ended.set())


@pytest.mark.parametrize(
    ("name", "done", "cleans_up"),
    [
        ("manifest-0001.json", False, False),
        ("manifest-0002.json", False, True),
        ("manifest-0002.json", True, False),
        ("manifest.json", False, True),
        ("manifest.json", True, False),
    ],
)
def test_a_job_that_dies_can_be_run_again(spark, grown, undisturbed, tmp_path, monkeypatch, name, done, cleans_up):
    """Whether it dies by an error or is killed (and cleans nothing up), nothing is lost or there twice."""
    settings, first = grown
    want = load_manifest(str(undisturbed))
    with monkeypatch.context() as dying:
        dies_at(dying, name, done=done)
        if not cleans_up:
            is_killed(dying)
        with pytest.raises(KilledError):
            ingest_dataset(spark, settings, cache="unused")
    published = (name, done) in {("manifest-0002.json", True), ("manifest.json", False), ("manifest.json", True)}
    assert load_manifest(str(tmp_path / "data")).digest == (want if published else first).digest
    monkeypatch.setattr(claim, "LEASE_SECONDS", 0.5)
    again, written = ingest_dataset(spark, settings, cache="unused")
    assert written == (not published)
    assert again.digest == want.digest
    assert sorted(shards_of(tmp_path / "data")) == sorted(shards_of(undisturbed))
    assert load_manifest(str(tmp_path / "data"), 1) == first
    assert (tmp_path / "data" / "manifest.json").read_bytes() == (tmp_path / "data" / "manifest-0002.json").read_bytes()
    check_statistics(tmp_path / "data")


def test_versions_outlive_a_manifest_that_is_gone(spark, grown, tmp_path):
    settings, first = grown
    data = tmp_path / "data"
    second, _ = ingest_dataset(spark, settings, cache="unused")
    before = shards_of(data)
    (data / "manifest.json").unlink()
    assert ingest_dataset(spark, settings, cache="unused") == (second, False)
    assert (data / "manifest.json").exists()
    (data / "manifest.json").unlink()
    write_picture(tmp_path / "in" / "cat" / "one more.png", 99)
    third, _ = ingest_dataset(spark, settings, cache="unused")
    assert (third.version, third.input_rows) == (3, 43)
    assert shards_of(data).items() > before.items()
    assert [load_manifest(str(data), version) for version in (1, 2)] == [first, second]
    # Where shards are there that no version lists, one may be gone for good with its manifest: nothing is touched.
    (data / "manifest.json").unlink()
    (data / "manifest-0003.json").unlink()
    write_picture(tmp_path / "in" / "cat" / "and one.png", 98)
    before = shards_of(data)
    told = r"manifest\.json is missing, and no version up to 2 lists \S+: restore that file, or, .* copy manifest-0002"
    with pytest.raises(DatasetError, match=told):
        ingest_dataset(spark, settings, cache="unused")
    assert shards_of(data) == before


def test_what_a_killed_job_left_is_removed_and_other_peoples_files_are_not(spark, grown, tmp_path):
    settings, _ = grown
    data = tmp_path / "data"
    left = [data / "train" / "part-deadbeef-00007.parquet", data / "quarantine" / "part-deadbeef-00000.parquet"]
    others = [data / "train" / "part-00000-0f2c7b1e-c000.snappy.parquet", data / "train" / "notes.txt"]
    for path in left + others:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    found, _ = ingest_dataset(spark, settings, cache="unused")
    assert found.input_rows == 42
    assert not any(path.exists() for path in left)
    assert all(path.exists() for path in others)


def test_what_was_set_aside_does_not_come_again(spark, tmp_path):
    folder = write_folder(tmp_path / "in", 20)
    (folder / "cat" / "empty.png").touch()
    settings = folder_settings(tmp_path / "data", folder, max_bad_share=0.2)
    ingest_dataset(spark, settings, cache="unused")
    write_folder(folder, 4, first=20)
    (folder / "dog" / "empty.png").touch()
    write_picture(folder / "bird" / "1.png", 50)  # of a class that the dataset does not have
    found, _ = ingest_dataset(spark, appended(settings, max_bad_share=0.5), cache="unused")
    assert (found.input_rows, found.set_aside) == (27, {"empty": 2, "unknown_label": 1})
    assert found.classes == ("cat", "dog")
    assert found.sources[1].already_there == 21
    check_statistics(tmp_path / "data")


def test_too_many_bad_rows_leave_the_earlier_version_as_it_was(spark, grown, tmp_path):
    settings, first = grown
    for number in range(3):
        (tmp_path / "in" / "cat" / f"empty{number}.png").touch()
    before = shards_of(tmp_path / "data")
    with pytest.raises(DatasetError, match=r"3 of 15 rows cannot be used \(empty 3\)"):
        ingest_dataset(spark, settings, cache="unused")
    assert load_manifest(str(tmp_path / "data")) == first
    after = shards_of(tmp_path / "data")
    assert {name for name in after.keys() - before.keys() if not name.startswith("quarantine/")} == set()
    assert after.items() >= before.items()


def test_the_sources_own_splits_hold_though_nothing_new_is_in_one(spark, tmp_path):
    folder = tmp_path / "in"
    for number, split in enumerate(("train", "validation", "test")):
        write_folder(folder / split, 10, first=100 * number)
    settings = folder_settings(tmp_path / "data", folder, source={"split_folders": True}, validation_share=0.5)
    ingest_dataset(spark, settings, cache="unused")
    write_folder(folder / "train", 20, first=1000)
    found, _ = ingest_dataset(spark, appended(settings), cache="unused")
    assert {name: split.rows for name, split in found.splits.items()} == {"train": 30, "validation": 10, "test": 10}


def test_ids_of_numbered_images_go_on(spark, tmp_path):
    one = write_idx_folder(tmp_path / "one", train_rows=60, test_rows=20)
    two = write_idx_folder(tmp_path / "two", train_rows=45, test_rows=15)
    settings = dataset_settings(tmp_path / "data", one)
    ingest_dataset(spark, settings, cache="unused")
    more = appended(settings, source=SourceSettings(kind="idx", path=str(two), classes=CLASSES))
    found, _ = ingest_dataset(spark, more, cache="unused")
    rows = rows_of(tmp_path / "data")
    assert sorted(rows) == list(range(140))
    for first_id, count, seed, test in ((0, 60, 1, False), (60, 20, 2, True), (80, 45, 1, False), (125, 15, 2, True)):
        pictures, labels = make_images(count, seed)
        for number in range(count):
            row = rows[first_id + number]
            assert (row["image"], row["label"]) == (pictures[number].tobytes(), labels[number])
            assert (row["split"] == "test") == test
    check_statistics(tmp_path / "data")
    assert found.version == 2
    assert not ingest_dataset(spark, more, cache="unused")[1]
    assert not ingest_dataset(spark, settings, cache="unused")[1]  # the first one is in it, too
    with pytest.raises(DatasetError, match=r"has all images of idx .*one already, .*: they would be in it twice"):
        ingest_dataset(spark, appended(settings, shard_bytes=1000), cache="unused")


def test_what_does_not_fit_is_refused_before_anything_is_written(spark, grown, tmp_path):
    settings, first = grown
    before = shards_of(tmp_path / "data")

    def refused(message, *, source=None, image=None, **changes):
        changed = settings.model_copy(update=changes)
        if source:
            changed = changed.model_copy(update={"source": settings.source.model_copy(update=source)})
        if image:
            changed = changed.model_copy(update={"image": settings.image.model_copy(update=image)})
        with pytest.raises(DatasetError, match=message) as error:
            ingest_dataset(spark, changed, cache="unused")
        assert "\n" not in str(error.value)

    refused("holds pictures, ingested from other input .* or set dataset.append to add what is new", append=False)
    refused(r"has raw images of shape \[3, 8, 8\], these would be raw of \[1, 8, 8\]", image={"shape": (1, 8, 8)})
    refused("has raw images of shape .*, these would be png of", image={"encoding": "png"})
    refused(
        "made with dataset.image decode exact, keep_jpeg false, these would be with decode scaled, decode_margin 3,",
        image={"decode": "scaled", "decode_margin": 3},
    )
    refused(
        "made with dataset.image resize crop, background 255, these would be with resize letterbox, background 0: set",
        image={"resize": "letterbox", "background": 0},
    )
    refused("has the classes cat, dog; the source has cat, cow", source={"classes": ("cat", "cow")})
    shutil.rmtree(tmp_path / "in")
    write_folder(tmp_path / "in", 20)  # fewer than there were
    refused("already has all 20 images of the source: nothing to append")
    assert shards_of(tmp_path / "data") == before
    assert load_manifest(str(tmp_path / "data")) == first


def test_a_shard_that_is_gone_is_said_before_anything_is_added(spark, grown, tmp_path):
    settings, first = grown
    lost = tmp_path / "data" / first.split("train").shards[0].path
    content = lost.read_bytes()
    lost.unlink()
    with pytest.raises(DatasetError, match=rf"{lost.name} is missing or cut: restore it before anything is appended"):
        ingest_dataset(spark, settings, cache="unused")
    lost.write_bytes(content)
    ingest_dataset(spark, settings, cache="unused")
    lost.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=rf"{lost.name} is missing or cut: restore it, or delete .* ingest its"):
        ingest_dataset(spark, settings, cache="unused")
