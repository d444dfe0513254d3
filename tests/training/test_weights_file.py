"""The file of weights: every kind that is read, and what is wrong with one, in words, without running its code."""

import hashlib
import io
import os

import pytest
import safetensors.torch
import torch
from torch import nn

from pipeline import storage
from pipeline.config.model import ModelSettings
from pipeline.training import weights_file
from pipeline.training.weights_file import WeightsError, digest_of, read_weights

STATE = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def saved(value, **how):
    buffer = io.BytesIO()
    torch.save(value, buffer, **how)
    return buffer.getvalue()


def write(folder, data, name="weights.pt"):
    path = f"{folder}/{name}"
    storage.publish(path, data)
    return path


def equals(found):
    return found.keys() == STATE.keys() and all(torch.equal(found[name], STATE[name]) for name in STATE)


@pytest.mark.parametrize(
    "data",
    [
        saved(STATE),
        saved(STATE, _use_new_zipfile_serialization=False),
        saved({"model": STATE, "progress": {"step": 3}}),
        safetensors.torch.save(STATE),
    ],
    ids=["zip", "legacy", "checkpoint", "safetensors"],
)
def test_every_kind_of_file(tmp_path, remote, data):
    """Told by their content: names say nothing."""
    for folder in (tmp_path, remote):
        path = write(folder, data)
        sha = hashlib.sha256(data).hexdigest()
        assert equals(read_weights(ModelSettings(weights=path)))
        assert equals(read_weights(ModelSettings(weights=path, weights_sha256=f"SHA256:{sha.upper()}"), sha))
        assert digest_of(ModelSettings(weights=path)) == sha


def test_a_file_that_is_replaced_is_read_again(tmp_path):
    path = write(tmp_path, b"one")
    first = digest_of(ModelSettings(weights=path))
    write(tmp_path, b"two")
    os.utime(path, (0, 0))
    assert digest_of(ModelSettings(weights=path)) == hashlib.sha256(b"two").hexdigest() != first
    assert digest_of(ModelSettings()) == ""


class Code:
    """What unpickles to a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


class Scripted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("new", [True, False])
def test_pickled_code_is_refused_and_does_not_run(tmp_path, new):
    victim = tmp_path / "ran"
    path = write(tmp_path, saved({"a": Code(str(victim)), **STATE}, _use_new_zipfile_serialization=new))
    with pytest.raises(
        WeightsError, match=r"holds pickled code \(posix\.mkdir\)\. sparknorm loads tensors alone, and"
    ) as e:
        read_weights(ModelSettings(weights=path))
    assert not victim.exists()
    assert str(e.value).startswith(f"model.weights {path}: ")
    assert "weights_only" not in str(e.value)


def test_archives_of_code_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(Scripted()), buffer)
    path = write(tmp_path, buffer.getvalue())
    with pytest.raises(WeightsError, match="it is an archive of TorchScript, which holds code"):
        read_weights(ModelSettings(weights=path))
    path = write(tmp_path, saved(nn.Linear(2, 2)))
    with pytest.raises(WeightsError, match="holds pickled code"):
        read_weights(ModelSettings(weights=path))


DAMAGED = {
    "zip": saved(STATE)[:-100],
    "legacy": saved(STATE, _use_new_zipfile_serialization=False)[:200],
    "header": safetensors.torch.save(STATE)[:60],
    "data": safetensors.torch.save(STATE)[:-8],
    "empty": b"",
    "pointer": b"version https://git-lfs.github.com/spec/v1",
    "noise": os.urandom(1000),
    "pickle": b"\x80\x02",
    "archive": b"PK\x03\x04",
}


@pytest.mark.parametrize("data", DAMAGED.values(), ids=DAMAGED)
def test_damage_is_one_sentence(tmp_path, data):
    path = write(tmp_path, data)
    with pytest.raises(WeightsError, match=r"it is damaged, or no (safetensors file|file of weights)") as raised:
        read_weights(ModelSettings(weights=path))
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < len(path) + 300


def test_what_is_not_there_or_another_file(tmp_path):
    for path in (f"{tmp_path}/none.pt", str(tmp_path)):
        for look in (read_weights, digest_of):
            with pytest.raises(WeightsError, match=r"there is no such file, as .* sees it"):
                look(ModelSettings(weights=path))
    path = write(tmp_path, saved(STATE))
    with pytest.raises(WeightsError, match=r"its SHA-256 is [0-9a-f]{64}, and model\.weights_sha256 is aaaa"):
        read_weights(ModelSettings(weights=path, weights_sha256="a" * 64))
    with pytest.raises(WeightsError, match="reads another file than the driver did"):
        read_weights(ModelSettings(weights=path), "b" * 64)


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = write(tmp_path, safetensors.torch.save(STATE))
    monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    with pytest.raises(WeightsError, match="lacks the package safetensors, which reads it: pip install safetensors"):
        read_weights(ModelSettings(weights=path))


@pytest.mark.parametrize("text", ["abc", "sha256:" + "g" * 64, ""])
def test_a_digest_has_64_digits(text):
    with pytest.raises(ValueError, match="is no SHA-256, which has 64 hex digits"):
        ModelSettings(weights="x", weights_sha256=text)


def test_nothing_is_read_where_the_setting_says_the_digest(monkeypatch):
    monkeypatch.setattr(weights_file, "_bytes", lambda path: pytest.fail("it was read"))
    assert digest_of(ModelSettings(weights="memory://gone", weights_sha256="c" * 64)) == "c" * 64
