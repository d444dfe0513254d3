import logging

import pytest
import torch

from pipeline.training import checkpoint

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


def test_one_that_cannot_be_read_now_stays(tmp_path, monkeypatch):
    save(tmp_path, 5)
    save(tmp_path, 10)

    def unreachable(path):
        raise ConnectionError(path)

    with monkeypatch.context() as outage:
        outage.setattr(checkpoint.storage, "read_bytes", unreachable)
        assert checkpoint.load_newest(str(tmp_path), identity=MINE, device=CPU, repair=True) is None
    assert load(tmp_path)["progress"]["step"] == 10


def test_that_of_another_run_is_refused(tmp_path):
    save(tmp_path, 5)
    with pytest.raises(checkpoint.CheckpointError, match="belongs to another run: dataset is 'd' there, 'e' here"):
        load(tmp_path, dataset="e")


def test_loading_runs_no_code(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("a checkpoint ran code",))

    checkpoint.save(str(tmp_path), {"model": Trap()}, step=1, identity=MINE, keep=1)
    with pytest.raises(Exception, match="Weights only load failed"):
        load(tmp_path)


def test_ranks_load_the_very_checkpoint_that_rank_0_found(tmp_path):
    for step in (5, 10):
        save(tmp_path, step)
    assert checkpoint.load_step(str(tmp_path), 5, identity=MINE, device=CPU)["progress"]["step"] == 5
    (tmp_path / "step-00000010.pt").unlink()
    with pytest.raises(checkpoint.CheckpointError, match="step-00000010, which rank 0 reads, cannot be read here"):
        checkpoint.load_step(str(tmp_path), 10, identity=MINE, device=CPU)
