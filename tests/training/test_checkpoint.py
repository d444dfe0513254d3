import json
import logging
import math
import os
import time

import pytest
import torch
from flaky_storage import FlakyFileSystem

from pipeline import storage
from pipeline.training import checkpoint
from pipeline.training.versions import VersionsError, current_versions

MINE = {"settings": "s", "dataset": "d"}
CPU = torch.device("cpu")


def save(folder, step, keep=3):
    state = {"model": {"w": torch.full((3,), float(step))}, "progress": {"step": step, "curve": [{"a": None}]}}
    return checkpoint.save(str(folder), state, step=step, identity=MINE, keep=keep)


def load(folder, **identity):
    return checkpoint.load_newest(str(folder), identity={**MINE, **identity}, device=CPU)


def test_the_newest_comes_back_and_the_old_go(tmp_path):
    assert load(tmp_path) is None
    for step in (5, 10, 15, 100):
        save(tmp_path, step)
    assert load(tmp_path)["progress"] == {"step": 100, "curve": [{"a": None}]}
    assert torch.equal(load(tmp_path)["model"]["w"], torch.full((3,), 100.0))
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == [f"step-{step:08d}.pt" for step in (10, 15, 100)]


def test_what_a_killed_process_was_writing_goes_when_nobody_can_be_at_it(tmp_path):
    save(tmp_path, 5)
    old = [".step-00000010.pt.0123abcd", ".step-00000010.json.0123abcd"]
    new = ".step-00000011.pt.0123abcd"
    others = [new, ".step-00000010.pt.0123abcg", ".other.pt.0123abcd", "step-00000010.pt.0123abcd"]
    for name in (*old, *others):
        (tmp_path / name).write_bytes(b"half of it")
    for name in (*old, *others[1:]):
        os.utime(tmp_path / name, times=(time.time() - 4000,) * 2)
    before = {path.name for path in tmp_path.iterdir()}
    load(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == before
    checkpoint.load_newest(str(tmp_path), identity=MINE, device=CPU, repair=True)
    assert {path.name for path in tmp_path.iterdir()} == before - set(old)


DAMAGES = ("cut", "altered", "no seal", "broken seal", "gone")


def harm(path, damage):
    seal, data = path.with_suffix(".json"), path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:-10])
    elif damage == "altered":
        path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    elif damage == "no seal":
        seal.unlink()
    elif damage == "broken seal":
        seal.write_text("{")
    else:
        path.unlink()


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_passed_over(tmp_path, caplog, damage):
    save(tmp_path, 5)
    harm(tmp_path / save(tmp_path, 10)[0], damage)
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path)["progress"]["step"] == 5
    assert ("step-00000010" in caplog.text) == (damage != "no seal")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_does_not_outlive_those_that_are_made_after_it(tmp_path, damage):
    save(tmp_path, 5)
    harm(tmp_path / save(tmp_path, 10)[0], damage)
    assert checkpoint.load_newest(str(tmp_path), identity=MINE, device=CPU, repair=True)["progress"]["step"] == 5
    assert {path.stem for path in tmp_path.iterdir()} == {"step-00000005"}
    save(tmp_path, 7, keep=1)
    assert load(tmp_path)["progress"]["step"] == checkpoint.newest_step(str(tmp_path)) == 7
    assert {path.name for path in tmp_path.iterdir()} == {"step-00000007.pt", "step-00000007.json"}


@pytest.fixture
def flaky(tmp_path):
    """The address of a folder on storage that fails when it is told to."""
    yield f"flaky://{tmp_path}"
    FlakyFileSystem.failures.clear()
    FlakyFileSystem.halves.clear()


@pytest.mark.parametrize("file", ["", "step-00000010.json", "step-00000010.pt"], ids=["folder", "seal", "state"])
def test_one_that_cannot_be_read_for_a_moment_is_waited_for(tmp_path, flaky, caplog, file):
    """0.7.0 began at an earlier checkpoint, or at step 0."""
    save(tmp_path, 5)
    save(tmp_path, 10)
    FlakyFileSystem.failures[file or tmp_path.name] = 3
    assert checkpoint.load_newest(flaky, identity=MINE, device=CPU, repair=True)["progress"]["step"] == 10
    assert not any(FlakyFileSystem.failures.values())
    FlakyFileSystem.failures[file or tmp_path.name] = 3
    assert checkpoint.newest_step(flaky) == 10
    FlakyFileSystem.failures[file or tmp_path.name] = math.inf
    for read in (checkpoint.load_newest, checkpoint.load_step):
        more = {"step": 10} if read is checkpoint.load_step else {"repair": True}
        if file or read is checkpoint.load_newest:
            message = rf"{file} cannot be (read|listed) from \S+: ThrottledError: 503 SlowDown \(. tries in 0 s\)"
            with storage.retry_for(0.3), pytest.raises(storage.UnreachableError, match=message):
                read(flaky, identity=MINE, device=CPU, **more)
    assert not [record for record in caplog.records if "cannot be used" in record.getMessage()]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("file", ["step-00000010.json", "step-00000010.pt"], ids=["seal", "state"])
def test_what_comes_cut_and_lies_whole_is_no_damage(tmp_path, flaky, file):
    save(tmp_path, 5)
    save(tmp_path, 10)
    FlakyFileSystem.halves[file] = 1
    assert checkpoint.load_newest(flaky, identity=MINE, device=CPU, repair=True)["progress"]["step"] == 10


def test_the_one_just_written_stays_also_beside_later_steps(tmp_path):
    """0.7.0 kept the highest steps, and deleted what it had just written."""
    for step in (100, 110, 3, 6, 9):
        save(tmp_path, step, keep=2)
        assert (tmp_path / f"step-{step:08d}.pt").exists()
    assert sorted(p.name for p in tmp_path.glob("*.json")) == [
        f"step-{step:08d}.json" for step in (6, 9, 100, 110)
    ]  # fmt: skip


def test_old_ones_that_cannot_be_deleted_now_go_later(tmp_path, flaky, caplog):
    FlakyFileSystem.failures["step-00000001.json"] = 1
    for step in (1, 2):
        save(flaky, step, keep=1)
    assert "could not be deleted: " in caplog.text
    save(flaky, 3, keep=1)
    assert {path.stem for path in tmp_path.iterdir()} == {"step-00000003"}


def test_steps_count_as_numbers_and_other_files_do_not(tmp_path):
    for step in (99_999_999, 100_000_000):
        save(tmp_path, step)
    (tmp_path / "step-notes.json").write_text("{}")
    (tmp_path / "zzz.json").write_text("{}")
    assert checkpoint.newest_step(str(tmp_path)) == load(tmp_path)["progress"]["step"] == 100_000_000


@pytest.mark.parametrize("damage", ["no seal", "broken seal", "gone"])
def test_a_name_alone_is_no_step(tmp_path, damage):
    """Whether a training gets on is told by what can be read of its checkpoints."""
    save(tmp_path, 5)
    harm(tmp_path / save(tmp_path, 10)[0], damage)
    assert checkpoint.newest_step(str(tmp_path)) == 5


def test_a_seal_of_a_later_version_is_no_damage(tmp_path):
    save(tmp_path, 5)
    seal = tmp_path / "step-00000005.json"
    seal.write_text(seal.read_text().replace("{", '{"something": "new", ', 1))
    assert load(tmp_path)["progress"]["step"] == 5


def remade(folder, **versions):
    """The seal of step 5 as a process with other versions would have written it."""
    save(folder, 5)
    path = folder / "step-00000005.json"
    seal = json.loads(path.read_text())
    assert seal["versions"] == current_versions()
    path.write_text(json.dumps({**seal, "versions": versions}))


def test_that_of_other_versions_is_warned_of_or_refused(tmp_path):
    here = current_versions()
    words = f"sparknorm {here['sparknorm']} and torch {here['torch']}"
    for versions, made_with in (
        ({**here, "torch": "2.4.1"}, f"sparknorm {here['sparknorm']} and torch 2.4.1"),
        ({**here, "sparknorm": "0.6.0"}, f"sparknorm 0.6.0 and torch {here['torch']}"),
        ({}, "sparknorm 0.7.0 or earlier, which did not note versions"),
    ):
        remade(tmp_path, **versions)
        said = []
        state = checkpoint.load_newest(str(tmp_path), identity=MINE, device=CPU, warn=said.append)
        assert state["progress"]["step"] == 5
        (text,) = said
        assert f"step-00000005 was made with {made_with}, and here is {words}: its numbers may differ" in text
        with pytest.raises(VersionsError, match=r"step-00000005 was made with .* set checkpoint\.other_versions=warn"):
            checkpoint.load_newest(str(tmp_path), identity=MINE, device=CPU, other_versions="refuse")
    save(tmp_path, 5)
    checkpoint.load_newest(str(tmp_path), identity=MINE, device=CPU, warn=pytest.fail, other_versions="refuse")


def test_that_of_another_run_is_refused(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(checkpoint.CheckpointError, match="belongs to another run: dataset is 'd' there, 'e' here"):
        load(tmp_path, dataset="e")


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint ran code",))

    checkpoint.save(str(tmp_path), {"model": Trap()}, step=1, identity=MINE, keep=1)
    with pytest.raises(checkpoint.CheckpointError, match=r"step-00000001 holds no state .*Weights only load failed"):
        load(tmp_path)


def test_ranks_load_the_very_checkpoint_that_rank_0_found(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    assert checkpoint.load_step(str(tmp_path), 5, identity=MINE, device=CPU)["progress"]["step"] == 5
    (tmp_path / "step-00000010.pt").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="step-00000010, which rank 0 reads, cannot be read here"):
        checkpoint.load_step(str(tmp_path), 10, identity=MINE, device=CPU)
