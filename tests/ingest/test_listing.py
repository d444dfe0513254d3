"""Every file below a folder once, shared out over tasks, whatever the shape of the tree; nobody holds all of it."""

import os
import tracemalloc

import fsspec
import pyarrow as pa
import pytest
from image_files import folder_settings, write_picture

from pipeline import storage
from pipeline.data.manifest import SPLITS
from pipeline.ingest.job import ingest_dataset
from pipeline.ingest.sources import listing
from pipeline.ingest.sources.source import SourceError
from pipeline.storage.pages import pages


def listed(root, folders=None):
    """Paths of all files as tasks find them, one batch after the other."""
    names, below = zip(*(folders or listing._shared_out(str(root))), strict=True)
    given = pa.RecordBatch.from_pydict({"folder": list(names), "below": list(below)})
    return [
        path for batch in listing._list_folders(iter([given]), root=str(root)) for path in batch["path"].to_pylist()
    ]


def as_before(root):
    """What was shared out when the driver looked at the first level alone."""
    tops = sorted(entry.name for entry in os.scandir(root) if os.path.isdir(entry.path) and entry.name[0] != ".")  # noqa: PTH112
    return [("", False), *((name, True) for name in tops)]


def write_tree(root, *, width, depth, files):
    """A full tree: ``width`` folders in each folder but the deepest ones, ``files`` empty files in each."""
    root.mkdir(parents=True, exist_ok=True)
    for number in range(files):
        (root / f"{number}.png").touch()
    for number in range(width if depth else 0):
        write_tree(root / f"f{number}", width=width, depth=depth - 1, files=files)


def test_one_folder_at_the_top_is_shared_out_from_below(tmp_path):
    write_tree(tmp_path / "only", width=5, depth=4, files=2)
    folders = listing._shared_out(str(tmp_path))
    assert sum(below for _, below in folders) == 5**3  # 25 of the level before were not enough
    found = listed(tmp_path)
    assert len(found) == len(set(found)) == 2 * sum(5**level for level in range(5))
    assert sorted(found) == sorted(listed(tmp_path, as_before(tmp_path)))


def test_many_folders_at_the_top_are_left_as_they_are(tmp_path):
    for number in range(70):
        write_tree(tmp_path / f"class {number}", width=1, depth=1, files=1)
    assert listing._shared_out(str(tmp_path)) == as_before(tmp_path)
    assert len(listed(tmp_path)) == 140


def test_links_hidden_folders_and_names_that_are_no_text_are_as_they_were(tmp_path):
    root = tmp_path / "in"
    write_tree(root / "a", width=2, depth=2, files=1)
    write_tree(tmp_path / "elsewhere" / "b", width=1, depth=1, files=1)
    (root / "a" / "back").symlink_to(root)  # in circles
    (root / "a" / "f0" / "up").symlink_to(root / "a")
    (root / "top").symlink_to(root)
    (root / "a" / "f1" / "b").symlink_to(tmp_path / "elsewhere" / "b")
    (root / "a" / "gone").symlink_to(tmp_path / "nowhere")
    write_tree(root / "a" / ".hidden", width=1, depth=1, files=1)
    os.makedirs(os.fsencode(root / "a" / "f1") + b"/\xff")  # noqa: PTH103
    with open(os.fsencode(root / "a" / "f1") + b"/\xff/0.png", "wb"):  # noqa: PTH123
        pass
    own = ("0", "f0/0", "f0/f0/0", "f0/f1/0", "f1/0", "f1/f0/0", "f1/f1/0", "f1/\\xff/0", "f1/b/0", "f1/b/f0/0")
    expected = sorted(["a/gone", *(f"a/{name}.png" for name in own)])
    # However they are shared out: as they are, with the whole as one task, and as it was.
    (root / "top").unlink()  # a link to the root is no folder of its own
    shared_out = [None, [("", True)], as_before(root)]
    (root / "top").symlink_to(root)
    for folders in shared_out:
        assert sorted(listed(root, folders)) == expected
    os.makedirs(os.fsencode(root) + b"/\xff")  # noqa: PTH103
    with pytest.raises(SourceError, match=r"the name of the folder \\xff is not UTF-8"):
        listing._shared_out(str(root))


def test_no_more_folders_than_can_be_shared_out(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "_MOST_FOLDERS", 10)
    monkeypatch.setattr(listing, "_FOLDERS", 1000)
    write_tree(tmp_path, width=4, depth=4, files=1)
    assert 10 <= len(listing._shared_out(str(tmp_path))) <= 10 + 4
    assert len(set(listed(tmp_path))) == len(listed(tmp_path)) == sum(4**level for level in range(5))


def test_a_flat_folder_is_one_task_and_in_nobodys_memory(tmp_path):
    """40,000 files, of which a list of tuples takes 12 MB."""
    folder = tmp_path / "flat"
    folder.mkdir()
    for number in range(40_000):
        os.close(os.open(folder / f"{number:012d}.png", os.O_CREAT))
    (folder / "inside").mkdir()
    (folder / "inside" / "x.png").touch()
    tracemalloc.start()
    assert listing._shared_out(str(folder)) == [("", True)]
    _, looked = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    given = pa.RecordBatch.from_pydict({"folder": [""], "below": [True]})
    rows = [len(batch) for batch in listing._list_folders(iter([given]), root=str(folder))]
    _, walked = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == [10_000] * 4 + [1]
    assert looked < 2 << 20
    assert walked < 6 << 20


@pytest.fixture(scope="module")
def deep_bucket(s3):
    """2,300 files: 1,100 in the root of the folder, the others in a tree below one folder."""
    bucket = s3.new_bucket()
    paths = [f"{bucket}/in/{number:05d}.png" for number in range(1100)]
    paths += [f"{bucket}/in/only/f{n % 9}/g{n % 8}/{n}.png" for n in range(1198)]
    paths += [f"{bucket}/in/only/.hidden/x.png", f"{bucket}/in/only/f0/.x.png"]
    # Two thousand requests at once wait longer for a busy server than a client waits for a connection.
    fsspec.filesystem("s3").pipe(dict.fromkeys(paths, b"1"), batch_size=16)
    return bucket


def test_a_bucket_is_listed_in_pages_and_shared_out(s3, deep_bucket):
    root = f"{deep_bucket}/in"
    parts = list(pages(root, below=True))
    assert [len(part) for part in parts] == [1000, 1000, 300]
    assert sorted(e["name"] for part in parts for e in part) == sorted(
        e["name"] for e in storage.entries(root, below=True)
    )
    folders = listing._shared_out(root)
    assert sum(below for _, below in folders) == 72
    found = listed(root, folders)
    assert len(found) == len(set(found)) == 2298
    assert sorted(found) == sorted(listed(root, [("", False), ("only", True)]))
    # Where the root has very many files, the driver does not read on.
    s3.faults.requests.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(listing, "_MOST_FILES", 500)
        assert listing._shared_out(root) == [("", True)]
    assert [request.kind for request in s3.faults.requests] == ["LIST"]


def test_a_page_that_fails_is_asked_for_again(s3, deep_bucket):
    with s3.faults.at_random(3, 0.5, longest=2, kinds=("slow_down", "reset"), only="GET") as made:
        assert sum(len(part) for part in pages(f"{deep_bucket}/in", below=True)) == 2300
    assert made.total()
    with (
        s3.faults.at_random(1, 1, kinds=("unavailable",)),
        storage.retry_for(0),
        pytest.raises(storage.UnreachableError),
    ):
        list(pages(f"{deep_bucket}/in", below=True))


def test_other_remote_storage_comes_as_a_whole(remote):
    for path in ("a/x.png", "a/b/y.png", "z.png"):
        storage.publish(f"{remote}/{path}", b"1")
    assert sorted(listed(remote)) == ["a/b/y.png", "a/x.png", "z.png"]
    assert listing._shared_out(remote) == [("", False), ("a", False), ("a/b", False)]


@pytest.mark.spark
@pytest.mark.parametrize("shape", ["one top folder", "flat"])
def test_the_dataset_is_the_same_however_it_was_listed(spark, tmp_path, monkeypatch, shape):
    for number in range(60):
        deep = f"all/{('cat', 'dog')[number % 2]}/{number % 7}/{number % 3}" if shape == "one top folder" else "."
        write_picture(tmp_path / "in" / deep / f"{number}.png", number)
    paths = (tmp_path / "in").rglob("*.png")
    lines = [f"{path.relative_to(tmp_path / 'in')},{('cat', 'dog')[int(path.stem) % 2]}" for path in paths]
    labels = "\n".join(["path,label", *lines])
    (tmp_path / "labels.csv").write_text(labels)
    source = {"labels": str(tmp_path / "labels.csv")}
    settings = {name: folder_settings(tmp_path / name, tmp_path / "in", source=source) for name in ("now", "then")}
    found, _ = ingest_dataset(spark, settings["now"], cache="unused")  # by the driver, since they are few
    assert found.input_rows == 60
    assert set(found.splits) <= set(SPLITS)
    monkeypatch.setattr(listing, "_MOST_BY_DRIVER", 59)
    assert ingest_dataset(spark, settings["now"], cache="unused") == (found, False)
    monkeypatch.setattr(listing, "_LEVELS", 1)  # as it was: the root, and each folder in it as a whole
    before, _ = ingest_dataset(spark, settings["then"], cache="unused")
    assert found.digest == before.digest


@pytest.mark.spark
def test_few_local_files_are_listed_by_the_driver(spark, tmp_path, monkeypatch):
    write_tree(tmp_path, width=3, depth=2, files=4)
    (tmp_path / ".hidden.png").touch()
    expected = sorted(listed(tmp_path))
    assert len(expected) == 52
    made = []
    for most, fixed in ((52, True), (51, False)):
        monkeypatch.setattr(listing, "_MOST_BY_DRIVER", most)
        files, is_fixed = listing.list_files(spark, str(tmp_path))
        assert is_fixed is fixed
        made.append(sorted(map(tuple, files.collect())))
        assert [path for path, _, _ in made[-1]] == expected
    assert made[0] == made[1]
