"""Publishing versions of a dataset and finding them, also where a process died or the storage is no help."""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from small_manifests import make

from pipeline import storage
from pipeline.data import load_manifest, manifest, versions
from pipeline.data.manifest import DatasetError


def test_published_and_loaded_are_equal(tmp_path):
    sealed = versions.publish(str(tmp_path), make())
    assert load_manifest(str(tmp_path)) == sealed
    assert sealed.digest.startswith("sha256:")


def test_what_is_wrong_with_a_manifest_is_said(tmp_path):
    with pytest.raises(DatasetError, match="no dataset here"):
        load_manifest(str(tmp_path))
    path = tmp_path / versions.FILE_NAME
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
    versions.publish(str(tmp_path), make())
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
    first = versions.publish(str(tmp_path), make())
    added = make().model_copy(update={"splits": {}, "input_rows": 2})  # nothing but rows that were set aside
    second = versions.publish(str(tmp_path), manifest.next_version(first, added), before=first)
    assert (second.version, second.previous, second.input_rows) == (2, first.digest, 14)
    assert second.set_aside == {"wrong_size": 4}
    assert second.split("train").rows == 10
    assert [load_manifest(str(tmp_path), version) for version in (None, 1, 2)] == [second, first, second]
    for version in (0, 3):
        with pytest.raises(DatasetError, match=rf"has versions 1 to 2; dataset\.version is {version}"):
            load_manifest(str(tmp_path), version)


def test_a_manifest_on_an_object_store():
    sealed = versions.publish("memory://bucket/data", make())
    assert load_manifest("memory://bucket/data") == sealed
    storage.remove("memory://bucket")


def after(before, rows=2, application="local-1"):
    """The version after one, with rows more that were set aside."""
    added = make().model_copy(update={"splits": {}, "input_rows": rows, "set_aside": {"empty": rows}})
    return manifest.next_version(before, added.model_copy(update={"spark_application": application}))


def as_0_7_wrote(folder):
    """Two versions as sparknorm 0.7 left them: the newest lies under one name alone."""
    first = versions.publish(str(folder), make())
    second = versions.publish(str(folder), after(first), before=first)
    (folder / "manifest-0002.json").unlink()
    return first, second


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_each_version_has_a_file_that_stays_as_it_is(tmp_path):
    first = versions.publish(str(tmp_path), make())
    whole = (tmp_path / "manifest-0001.json").read_bytes()
    versions.publish(str(tmp_path), after(first), before=first)
    assert names(tmp_path) == ["manifest-0001.json", "manifest-0002.json", "manifest.json"]
    assert (tmp_path / "manifest-0001.json").read_bytes() == whole
    assert (tmp_path / "manifest-0002.json").read_bytes() == (tmp_path / "manifest.json").read_bytes()


def test_datasets_of_earlier_sparknorms_are_read_and_go_on(tmp_path):
    first, second = as_0_7_wrote(tmp_path)
    assert [load_manifest(str(tmp_path), version) for version in (None, 1, 2)] == [second, first, second]
    third = versions.publish(str(tmp_path), after(second), before=second)
    assert [load_manifest(str(tmp_path), version) for version in (None, 1, 2, 3)] == [third, first, second, third]


@pytest.mark.parametrize("pointer", ["missing", "a version behind"])
def test_the_newest_version_is_found_without_its_pointer(tmp_path, caplog, pointer):
    first = versions.publish(str(tmp_path), make())
    older = (tmp_path / "manifest.json").read_bytes()
    second = versions.publish(str(tmp_path), after(first), before=first)
    (tmp_path / "manifest.json").unlink()
    if pointer == "a version behind":
        (tmp_path / "manifest.json").write_bytes(older)
    assert [load_manifest(str(tmp_path), version) for version in (None, 1, 2)] == [second, first, second]
    assert ("manifest.json is missing; the newest version that is there is 2" in caplog.text) == (pointer == "missing")
    versions.mend_pointer(str(tmp_path), second)
    assert (tmp_path / "manifest.json").read_bytes() == (tmp_path / "manifest-0002.json").read_bytes()


def test_a_version_is_published_once_and_the_second_job_is_told(tmp_path):
    first = versions.publish(str(tmp_path), make())
    second = versions.publish(str(tmp_path), after(first), before=first)
    with pytest.raises(
        DatasetError, match=r"version 2 of .* was published by another job \(Spark application local-1\)"
    ):
        versions.publish(str(tmp_path), after(first, rows=3), before=first)
    assert load_manifest(str(tmp_path)) == second
    # The same content is the same version, whoever publishes it.
    versions.publish(str(tmp_path), after(first, application="local-2"), before=first)
    assert load_manifest(str(tmp_path)).digest == second.digest


def published_by(dataset, first, number):
    try:
        return versions.publish(dataset, after(first, rows=number + 1), before=first).digest
    except DatasetError as error:
        return str(error)


def test_of_processes_that_publish_at_once_one_does(tmp_path):
    with ProcessPoolExecutor(3, mp_context=multiprocessing.get_context("fork")) as executor:
        for turn in range(40):
            dataset = str(tmp_path / str(turn))
            first = versions.publish(dataset, make())
            said = [future.result(60) for future in
                    [executor.submit(published_by, dataset, first, number) for number in range(3)]]  # fmt: skip
            assert [text for text in said if text.startswith("sha256:")] == [load_manifest(dataset).digest]
            assert sum("was published by another job" in text for text in said) == 2


def test_a_version_that_was_damaged_is_replaced(tmp_path):
    first = versions.publish(str(tmp_path), make())
    again = versions.publish(str(tmp_path), make(rows=9, groups=(9,), counts=(6, 3), aside=3), replaced=first)
    assert again.digest != first.digest
    assert load_manifest(str(tmp_path)) == load_manifest(str(tmp_path), 1) == again


def test_an_empty_file_is_no_version(tmp_path):
    """`storage.create` may leave one where it dies on a disk without hard links."""
    first = versions.publish(str(tmp_path), make())
    (tmp_path / "manifest-0002.json").touch()
    assert load_manifest(str(tmp_path)) == first
    (tmp_path / "manifest.json").unlink()
    assert load_manifest(str(tmp_path)) == first
    second = versions.publish(str(tmp_path), after(first), before=first)
    assert load_manifest(str(tmp_path)) == second


class PowerLossError(BaseException):
    pass


class DeleteThenMove(MemoryFileSystem):
    """A file is replaced as HDFS does it, and the process may die at any step: ``steps_left`` before it does."""

    protocol = "delete-then-move"
    store: ClassVar[dict] = {}
    pseudo_dirs: ClassVar[list] = [""]
    steps_left = 10**9

    def _step(self):
        type(self).steps_left -= 1
        if self.steps_left < 0:
            raise PowerLossError

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        self._step()
        super().pipe_file(path, value, mode, **kwargs)

    def mv(self, path1, path2, **kwargs):
        self._step()
        if self.exists(path2):
            self.rm_file(path2)
            self._step()
        super().mv(path1, path2, **kwargs)


@pytest.fixture
def dying():
    """The class of a filesystem that deletes a file before it replaces it, at ``delete-then-move://``."""
    fsspec.register_implementation("delete-then-move", DeleteThenMove, clobber=True)
    yield DeleteThenMove
    DeleteThenMove.store.clear()
    DeleteThenMove.steps_left = 10**9


def test_no_version_is_lost_where_replacing_deletes_first_and_a_job_dies(dying):
    died = 0
    for steps in range(20):
        dataset = f"delete-then-move://bucket/{steps}"
        first = versions.publish(dataset, make())
        dying.steps_left = steps
        try:
            versions.publish(dataset, after(first), before=first)
        except PowerLossError:
            died += 1
        dying.steps_left = 10**9
        newest = load_manifest(dataset)
        assert newest.digest in (first.digest, manifest.seal(after(first)).digest)
        if newest == first:
            newest = versions.publish(dataset, after(first), before=first)
        versions.mend_pointer(dataset, newest)
        assert [load_manifest(dataset, version) for version in (None, 1, 2)] == [newest, first, newest]
        assert storage.read_bytes(f"{dataset}/manifest.json") == storage.read_bytes(f"{dataset}/manifest-0002.json")
    assert died == 5  # before and after each file is written, and when the old one was deleted
