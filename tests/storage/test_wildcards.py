"""Names with `*`, `?` and `[`, which most drivers of fsspec take for patterns where they delete or move."""

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline import storage
from pipeline.storage.writable import prepare_output


@pytest.fixture(params=["local", "memory", "s3"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path)
    return request.getfixturevalue("remote" if request.param == "memory" else "bucket")


@pytest.mark.parametrize("name", ["exp*", "exp-?", "exp-[AB]", "exp-[1]"])
def test_results_of_other_studies_stay(root, name):
    others = [f"{root}/exp-{letter}/train.json" for letter in "AB1"]
    mine = f"{root}/{name}/train.json"
    for path in (*others, mine):
        storage.publish(path, b"{}")
    prepare_output(f"{root}/{name}", "train.json", "none.json")
    assert not storage.exists(mine)
    assert all(map(storage.exists, others))


@pytest.mark.parametrize("name", ["exp*", "exp[1]"])
def test_a_folder_is_removed_with_all_below_and_no_other(root, name):
    stays = [f"{root}/exp1/export/model.pt", f"{root}/exp1/export/below/export.json"]
    goes = [f"{root}/{name}/export/{below}" for below in ("model.pt", "below/export.json", "below/m*", "[x]/1")]
    for path in (*stays, *goes):
        storage.publish(path, b"1")
    storage.remove(f"{root}/{name}/export")
    storage.remove(f"{root}/{name}/export")
    assert storage.entries(f"{root}/{name}", below=True) == []
    assert all(map(storage.exists, stays))


def test_one_file_is_removed_and_no_other(root):
    for name in ("a1", "a2", "a*"):
        storage.publish(f"{root}/x/{name}", b"1")
    storage.remove_file(f"{root}/x/a*")
    assert storage.names(f"{root}/x") == ["a1", "a2"]
    storage.remove_file(f"{root}/x/a*")
    storage.remove(f"{root}/x/a*")
    assert storage.names(f"{root}/x") == ["a1", "a2"]


class SlowStore(MemoryFileSystem):
    """Files appear there by degrees, and it moves as fsspec does it for drivers that cannot: by copy and `rm`."""

    protocol = "slow"

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("slow://"))


def test_a_file_that_is_moved_into_place_is_the_only_one():
    fsspec.register_implementation("slow", SlowStore, clobber=True)
    try:
        for text in (b"1", b"2"):
            storage.publish("slow://x/a*[1]/file?", text)
        assert storage.read_bytes("slow://x/a*[1]/file?") == b"2"
        assert fsspec.filesystem("slow").find("slow://x") == ["/x/a*[1]/file?"]
    finally:
        storage.remove("slow://x")
