"""Checkpoints of damaged bytes: an earlier one, or an error that names the file; never code, never another error."""

import hashlib
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from damage import FEW, MANY, damaged, damaged_json
from hypothesis import given
from hypothesis import strategies as st

from pipeline.training import checkpoint

MINE = {"train": {"seed": 0}, "dataset": "sha256:0"}
CPU = torch.device("cpu")


def state_after(step):
    return {
        "model": {"w": torch.arange(4.0) + step, "count": torch.tensor(step)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        "progress": {"step": step, "curve": [{"accuracy": 0.5, "loss": None}]},
        "ranks": [],
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with whole checkpoints of steps 5 and 10."""
    folder = tmp_path_factory.mktemp("whole")
    for step in (5, 10):
        checkpoint.save(str(folder), state_after(step), step=step, identity=MINE, keep=2)
    return folder


def some_bytes(buffer_of):
    buffer = io.BytesIO()
    torch.save(buffer_of, buffer)
    return buffer.getvalue()


STATE = some_bytes(state_after(10))
SEAL = {"step": 10, "bytes": len(STATE), "sha256": hashlib.sha256(STATE).hexdigest(), "identity": MINE,
        "versions": {"sparknorm": "0.7.0", "torch": "2.13.0"}}  # fmt: skip


def check_damaged_files(whole, folder, state, seal):
    """Step 10 is damaged: whatever is left of it, step 5 or step 10 comes, or an error that names step 10."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole, folder)
    if state is not None:
        (folder / "step-00000010.pt").write_bytes(state)
    if seal is not None:
        (folder / "step-00000010.json").write_bytes(seal)
    assert checkpoint.newest_step(str(folder)) in (5, 10)
    for repair in (False, True):
        try:
            found = checkpoint.load_newest(str(folder), identity=MINE, device=CPU, repair=repair, warn=str)
        except checkpoint.CheckpointError as error:
            assert "step-00000010" in str(error)
            continue
        step = found["progress"]["step"]
        assert step in (5, 10)
        assert torch.equal(found["model"]["w"], state_after(step)["model"]["w"])
        assert checkpoint.newest_step(str(folder)) == step or not repair


FILES = {"state": st.none() | damaged(STATE), "seal": st.none() | damaged_json(SEAL)}


@FEW
@given(**FILES)
def test_damaged_files(whole, tmp_path, state, seal):
    check_damaged_files(whole, tmp_path / "damaged", state, seal)


@pytest.mark.slow
@MANY
@given(**FILES)
def test_many_damaged_files(whole, tmp_path, state, seal):
    check_damaged_files(whole, tmp_path / "damaged", state, seal)


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


MARK = "a-checkpoint-has-run-code"
TRAPS = [
    some_bytes({"model": {"w": torch.ones(2)}, "progress": {"step": 10}, "more": Trap(MARK)}),
    pickle.dumps(Trap(MARK)),
    pickle.dumps({"model": Trap(MARK)}, protocol=0),
]
SEALED = st.sampled_from([STATE, *TRAPS]).flatmap(damaged)


def check_sealed(folder, data):
    """Somebody has sealed other bytes: the digest is right, and what is loaded is a state or an error."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "step-00000010.pt").write_bytes(data)
    (folder / "step-00000010.json").write_text(json.dumps({**SEAL, "sha256": hashlib.sha256(data).hexdigest()}))
    try:
        assert "model" in checkpoint.load_newest(str(folder), identity=MINE, device=CPU, warn=str)
    except checkpoint.CheckpointError as error:
        assert "step-00000010 holds no state of a training (" in str(error)
        assert "\n" not in str(error)
    assert [path.name for path in Path().iterdir()] == [folder.name]


@FEW
@given(data=SEALED)
def test_sealed_bytes_that_are_no_state(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    check_sealed(tmp_path / "sealed", data)


@pytest.mark.slow
@MANY
@given(data=SEALED)
def test_many_sealed_bytes_that_are_no_state(tmp_path, monkeypatch, data):
    monkeypatch.chdir(tmp_path)
    check_sealed(tmp_path / "sealed", data)


@pytest.mark.parametrize("data", TRAPS, ids=["torch", "pickle", "protocol 0"])
def test_the_traps_would_run_code_elsewhere(tmp_path, monkeypatch, data):
    """What the tests above are worth: the same bytes make the folder where code may run."""
    monkeypatch.chdir(tmp_path)
    torch.load(io.BytesIO(data), weights_only=False) if data is TRAPS[0] else pickle.loads(data)
    assert Path(MARK).exists()
