"""The GPU of a rank, decided without one; and the discovery script, with a stand-in for nvidia-smi."""

import json
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.distributed.device import choose_device, device_index

A, B, C = (f"{digit * 8}-{digit * 4}-{digit * 4}-{digit * 4}-{digit * 12}" for digit in "abc")
M, N = "5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77", "cba663e8-9bed-5b25-b243-5985ef7c9beb"


@pytest.fixture(autouse=True)
def same_environment_afterwards(monkeypatch):
    """A choice may set CUDA_VISIBLE_DEVICES; the next test must not see it."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(
    ("address", "visible", "uuids", "index"),
    [
        ("3", None, [A, B, C, M], 3),
        ("3", ["3"], [B], 0),
        ("5", ["7", "5"], [A, B], 1),
        ("0", ["GPU-" + A, "0"], [A, B], 1),
        # CUDA shows the devices in an order of its own: by speed, or that of CUDA_VISIBLE_DEVICES.
        (f"GPU-{B}", None, [C, A, B], 2),
        (f"GPU-{B}", ["1", "0"], [B, A], 0),
        (f"GPU-{B}", [f"GPU-{A}", "GPU-bbbb"], [A, B], 1),
        (f"GPU-{B}".upper(), None, [A, B], 1),
        # A driver may give a MIG device's own UUID, or that of the GPU it is a part of.
        (f"MIG-{M}", None, [N, M], 1),
        (f"MIG-{M}", [f"MIG-{M}"], [A], 0),
        (f"MIG-{M}", ["MIG-5d5b"], [A], 0),
        # CUDA can still be told which one to show.
        (f"MIG-{M}", None, None, None),
        (f"MIG-{M}", [f"MIG-{N}", f"MIG-{M}"], None, None),
        (f"MIG-GPU-{A}/7/0", [f"MIG-GPU-{A}/7/0"], None, None),
    ],
)
def test_an_address_is_one_of_the_visible_devices(address, visible, uuids, index):
    assert device_index(address, visible, uuids) == index


@pytest.mark.parametrize(
    ("address", "visible", "uuids", "words"),
    [
        ("2", ["0", "1"], [A, B], ["GPU 2 on", "(CUDA_VISIBLE_DEVICES=0,1)", "discoveryScript"]),
        ("0", [f"GPU-{A}"], [A], ["GPU 0 on", f"(CUDA_VISIBLE_DEVICES=GPU-{A})"]),
        ("0", [], [], ["(CUDA_VISIBLE_DEVICES=)"]),
        (f"GPU-{C}", ["0", "1"], [A, B], [f"GPU-{C}", "=0,1)", f"CUDA shows {A}, {B}", "unset CUDA_VISIBLE_DEVICES"]),
        (f"GPU-{C}", None, [A, B], ["not among its visible devices;"]),
        ("GPU-", None, [A], ["not among"]),
        (f"MIG-{M}", [f"MIG-{N}"], None, [f"MIG-{M}", f"=MIG-{N})", "unset CUDA_VISIBLE_DEVICES"]),
        (f"MIG-{M}", ["0"], None, ["=0)"]),
        (f"MIG-{M}", [f"MIG-{N}"], [A], ["has initialised CUDA with other devices", "spark.python.worker.reuse=false"]),
        (f"MIG-{M}", None, [A], ["spark.python.worker.reuse=false"]),
    ],
)
def test_an_address_that_is_not_visible_is_an_error(address, visible, uuids, words):
    with pytest.raises(ValueError) as error:
        device_index(address, visible, uuids)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.fixture
def cuda(monkeypatch):
    """Stands for a host with devices of these UUIDs; as CUDA does, it reads CUDA_VISIBLE_DEVICES once."""
    state = SimpleNamespace(all=[A, B], shown=None, current=None)

    def shown():
        if state.shown is None:
            entries = os.environ.get("CUDA_VISIBLE_DEVICES")
            known = {key: uuid for at, uuid in enumerate(state.all) for key in (str(at), f"GPU-{uuid}", f"MIG-{uuid}")}
            state.shown = state.all if entries is None else [known[entry] for entry in entries.split(",") if entry]
        return state.shown

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(state.shown))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(shown()))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(shown()))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda at: SimpleNamespace(uuid=shown()[at]))
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: setattr(state, "current", index))
    return state


def test_a_rank_takes_what_spark_assigned_or_its_local_rank(cuda):
    assert choose_device("auto", "1", 0) == torch.device("cuda", 1)
    assert cuda.current == 1
    assert choose_device("cuda", f"GPU-{B}", 0) == torch.device("cuda", 1)
    assert choose_device("cuda", None, 0) == torch.device("cuda", 0)
    assert choose_device("cpu", "1", 0) == torch.device("cpu")
    assert choose_device("cpu", f"MIG-{M}", 0) == torch.device("cpu")
    assert "CUDA_VISIBLE_DEVICES" not in os.environ  # for the next task of a Python worker, all are there still
    with pytest.raises(ValueError, match=r"GPU 2 was asked for, but \S+ has 2: start no more ranks"):
        choose_device("cuda", None, 2)


def test_the_list_of_visible_devices_is_respected(cuda, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_device("auto", "1", 0) == torch.device("cuda", 0)
    assert choose_device("auto", f"GPU-{B}", 0) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=rf"GPU-{A} on .*CUDA_VISIBLE_DEVICES=1"):
        choose_device("auto", f"GPU-{A}", 0)


def test_a_mig_device_is_made_the_only_visible_one(cuda):
    cuda.all = [M, N]
    assert choose_device("auto", f"MIG-{N}", 0) == torch.device("cuda", 0)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == f"MIG-{N}"
    assert choose_device("auto", f"MIG-{N}", 0) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match=r"spark.python.worker.reuse=false"):
        choose_device("auto", f"MIG-{M}", 0)


def test_a_cuda_that_was_asked_before_cannot_be_told(cuda, monkeypatch):
    cuda.all = [M, N]
    assert torch.cuda.is_available()  # fixes what CUDA shows, though torch calls it not initialised
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=r"goes on showing 2: set spark.python.worker.reuse=false"):
        choose_device("auto", f"MIG-{N}", 0)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ


def test_no_device_at_all(cuda, monkeypatch):
    cuda.all = []
    assert choose_device("auto", None, 0) == torch.device("cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for requested, address in (("cuda", None), ("auto", "0"), ("auto", f"GPU-{A}")):
        with pytest.raises(ValueError, match=rf"workers.device is {requested}, but torch sees no CUDA device on .*=\)"):
            choose_device(requested, address, 0)
    with pytest.raises(ValueError, match=r"MIG-.*CUDA_VISIBLE_DEVICES=\)"):
        choose_device("auto", f"MIG-{M}", 0)


DISCOVERY = Path(__file__).parents[2] / "conf" / "spark" / "gpu_discovery.sh"
WHOLE = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-{A})
GPU 1: Quadro (R) T1000 (UUID: GPU-{B})"""
PARTS = f"""\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-{A})
  MIG 3g.20gb     Device  0: (UUID: MIG-{M})
  MIG 1c.3g.20gb  Device  1: (UUID: MIG-GPU-{A}/1/0)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-{B})"""


def discover(folder: Path, modes: str, devices: str, code: int = 0) -> subprocess.CompletedProcess:
    """Run the script where nvidia-smi prints ``modes`` to its query and ``devices`` to -L."""
    (folder / "modes").write_text(modes + "\n")
    (folder / "devices").write_text(devices + "\n")
    smi = folder / "nvidia-smi"
    smi.write_text(
        '#!/bin/sh\ncase "$*" in\n'
        f'"--query-gpu=uuid,mig.mode.current --format=csv,noheader") cat "{folder}/modes" ;;\n'
        f'-L) cat "{folder}/devices" ;;\n*) exit 2 ;;\nesac\nexit {code}\n'
    )
    smi.chmod(0o755)
    path = f"{folder}{os.pathsep}/usr/bin{os.pathsep}/bin"
    return subprocess.run([DISCOVERY], env={"PATH": path}, capture_output=True, text=True, timeout=20, check=False)


@pytest.mark.parametrize(
    ("modes", "devices", "addresses"),
    [
        (f"GPU-{A}, Disabled\nGPU-{B}, [N/A]", WHOLE, [f"GPU-{A}", f"GPU-{B}"]),
        (f"GPU-{A}, Enabled\nGPU-{B}, Disabled", PARTS, [f"MIG-{M}", f"MIG-GPU-{A}/1/0", f"GPU-{B}"]),
        # In MIG mode without MIG devices: of no use to CUDA.
        (f"GPU-{A}, Disabled\nGPU-{B}, Enabled", WHOLE, [f"GPU-{A}"]),
    ],
)
def test_discovery_prints_what_cuda_can_use(tmp_path, modes, devices, addresses):
    done = discover(tmp_path, modes, devices)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"name": "gpu", "addresses": addresses}


def test_discovery_that_fails_says_why(tmp_path):
    done = discover(tmp_path, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", "", 9)
    assert (done.returncode, done.stdout) == (1, "")
    assert "couldn't communicate with the NVIDIA driver" in done.stderr
    done = discover(tmp_path, f"GPU-{A}, Enabled", WHOLE.splitlines()[0])
    assert (done.returncode, done.stdout) == (1, "")
    assert "no GPU that can be used" in done.stderr
    (tmp_path / "nvidia-smi").unlink()
    done = subprocess.run([DISCOVERY], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True,
                          timeout=20, check=False)  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert "nvidia-smi is not on PATH" in done.stderr
