"""States that are written beside a training: one is being written, one waits, and the third is waited for."""

import threading
import time

import pytest
import torch

from pipeline.training import checkpoint
from pipeline.training.checkpoint_writer import CheckpointWriter

IDENTITY = {"version": 1}
SECONDS = 30


class SlowStorage:
    """A hook that lets a write begin only when the test says so."""

    def __init__(self):
        self.begun, self._may_go_on = [], threading.Semaphore(0)

    def __call__(self, name, *, step):
        if name == "before_write":
            self.begun.append(step)
            assert self._may_go_on.acquire(timeout=SECONDS)

    def let_one_through(self):
        self._may_go_on.release()


@pytest.fixture
def told():
    return []


@pytest.fixture
def storage():
    return SlowStorage()


@pytest.fixture
def writer(tmp_path, told, storage):
    return CheckpointWriter(
        str(tmp_path), IDENTITY, keep=10, emit=lambda kind, **fields: told.append((kind, fields["step"])),
        flush=lambda: None, hook=storage,
    )  # fmt: skip


def wait_until(found):
    give_up_at = time.monotonic() + SECONDS
    while not found():
        assert time.monotonic() < give_up_at
        time.sleep(0.01)


def test_a_save_does_not_wait_for_the_one_before(tmp_path, writer, storage, told):
    weights = torch.zeros(3)
    for step in (1, 2):
        weights.fill_(step)
        writer.begin({"model": weights}, step)
        weights.fill_(99)  # training goes on
    assert writer.busy
    assert told == []
    third = threading.Thread(target=writer.begin, args=({"model": torch.full((3,), 3.0)}, 3), daemon=True)
    third.start()
    third.join(0.3)
    assert third.is_alive()  # two states are in memory, and no third is copied
    storage.let_one_through()
    third.join(SECONDS)
    assert not third.is_alive()
    storage.let_one_through()
    storage.let_one_through()
    writer.finish()
    assert not writer.busy
    assert told == [("checkpoint", 1), ("checkpoint", 2), ("checkpoint", 3)]
    for step in (1, 2, 3):
        values = checkpoint.load_step(str(tmp_path), step, identity=IDENTITY, device=torch.device("cpu"))
        assert values["model"].tolist() == [step] * 3


def test_a_thread_that_has_ended_is_followed_by_another(writer, storage, told):
    for step in (1, 2):
        storage.let_one_through()
        writer.begin({"model": {}}, step)
        writer.wait()
        assert not writer.busy
    assert [step for _, step in told] == [1, 2]
    wait_until(lambda: not [each for each in threading.enumerate() if each.name == "sparknorm-checkpoint"])


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_fails_unexpectedly_is_waited_for_by_nobody(tmp_path):
    def emit(kind, **_):
        raise RuntimeError(kind)

    writer = CheckpointWriter(str(tmp_path), IDENTITY, keep=10, emit=emit, flush=lambda: None)
    writer.begin({"model": {}}, 1)
    waiting = threading.Thread(target=writer.wait, daemon=True)
    waiting.start()
    waiting.join(SECONDS)
    assert not waiting.is_alive()
    assert not writer.busy
