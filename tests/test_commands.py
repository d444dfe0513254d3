"""Bad input, as a person gives it: one clear error in seconds, exit code 1, nothing left that looks finished.

A command that needs Spark runs in a process of its own once; the others use the session of the tests, which takes a
tenth of the time.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_data import CLASSES, make_images, write_idx, write_idx_folder

from pipeline import __main__ as commands
from pipeline.config import load_settings

pytestmark = pytest.mark.long

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "conf" / "quickstart.yaml"


def command(*words, cwd, env=None):
    return subprocess.run(
        [sys.executable, "-m", "pipeline", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), **(env or {})},
        check=False,
    )


def refused(name, *overrides, cwd, words, env=None, seconds=60):
    """The command ends with one error that has the words."""
    started = time.monotonic()
    done = command(name, *options(overrides), cwd=cwd, env=env)
    assert time.monotonic() - started < seconds
    assert_one_error(done.returncode, done.stdout, done.stderr, words)


def options(overrides):
    return ["-c", str(QUICKSTART), *(part for override in overrides for part in ("-o", override))]


def assert_one_error(code, stdout, stderr, words):
    assert code == 1, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    error = stderr[stderr.index("error: ") :]
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error


@pytest.fixture
def refused_here(spark, tmp_path, monkeypatch, capsys):
    """As `refused`, in this process and its session."""
    monkeypatch.chdir(tmp_path)

    def refuse(name, *overrides, words):
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            commands.main(lambda: commands.app([name, *options(overrides)], standalone_mode=False))
        assert_one_error(ended.value.code, *capsys.readouterr(), words)

    return refuse


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epocs=3", ["unknown setting train.epocs", "did you mean train.epochs?"]),
        ("workers.count=3", ["workers.count 3 does not divide train.lanes 16", "[1, 2, 4, 8, 16]"]),
    ],
)
def test_settings_are_refused_before_spark_starts(tmp_path, override, words):
    refused("train", override, cwd=tmp_path, words=words, seconds=15)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_settings_file(tmp_path):
    done = command("compare", "-c", "nothing.yaml", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nothing.yaml: no such settings file\n"


def test_settings_are_printed_as_a_file_that_can_be_used(tmp_path):
    printed = command("settings", "-c", str(QUICKSTART), "-o", "model.norm_scale=off", cwd=tmp_path)
    assert (printed.returncode, printed.stderr) == (0, "")
    (tmp_path / "whole.yaml").write_text(printed.stdout)
    assert load_settings(tmp_path / "whole.yaml") == load_settings(QUICKSTART, ["model.norm_scale=off"])
    assert "norm_scale: off  # default: learned" in printed.stdout
    refused("settings", "train.epocs=3", cwd=tmp_path, words=["did you mean train.epochs?"])


def of_idx(folder):
    return [f"dataset.source.path={folder}", "dataset.source.kind=idx", f"dataset.source.classes=[{','.join(CLASSES)}]"]


@pytest.mark.spark
def test_a_missing_source(refused_here, tmp_path):
    refused_here("ingest", "dataset.source.path=/nowhere", words=["/nowhere: no such folder"])
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.spark
def test_a_cut_idx_file(refused_here, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=50, test_rows=20)
    path = folder / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-99])
    refused_here("ingest", *of_idx(folder), words=[str(path), "is cut or damaged"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.spark
def test_more_labels_than_images(refused_here, tmp_path):
    folder = write_idx_folder(tmp_path / "idx", train_rows=50, test_rows=20)
    write_idx(folder, "train-labels-idx1-ubyte", make_images(51, 0)[1])
    refused_here("ingest", *of_idx(folder), words=["has 50 images, but", "has 51 labels"])
    assert not (tmp_path / "runs").exists()


@pytest.mark.spark
def test_a_missing_dataset(refused_here, tmp_path):
    refused_here("compare", words=["no dataset here", "run `ingest` first"])
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.spark
def test_more_workers_than_slots(refused_here, tmp_path, dataset):
    overrides = [f"dataset.path={dataset}", "workers.count=4", "train.batch_size=32", "model.width=8"]
    words = ["workers.count is 4, but local[2] has 2 slots", "local[4]"]
    refused("compare", *overrides, cwd=tmp_path, words=words)
    refused_here("train", *overrides, words=words)
    assert not list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.db"))


def test_java_that_is_missing_or_too_old(tmp_path):
    refused(
        "ingest",
        cwd=tmp_path,
        env={"JAVA_HOME": str(tmp_path)},
        words=["needs Java 17 or newer", "JAVA_HOME", "apt-get"],
    )
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text("#!/bin/sh\necho 'openjdk version \"11.0.2\" 2019-01-15' >&2\n")
    java.chmod(0o755)
    refused("ingest", cwd=tmp_path, env={"JAVA_HOME": str(tmp_path)}, words=[f"{java} is version 11"])


def test_make_says_the_same_before_it_installs_anything(tmp_path):
    for name in ("Makefile", "setup.cfg", "pyproject.toml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "constraints.txt").touch()
    (tmp_path / "pipeline").mkdir()
    for name in ("__init__.py", "java.py"):
        (tmp_path / "pipeline" / name).write_bytes((REPOSITORY / "pipeline" / name).read_bytes())
    env = {**os.environ, "JAVA_HOME": "/nowhere", "PYTHONPATH": ""}
    make = ["make", "-C", str(tmp_path), "setup", f"PYTHON={sys.executable}"]
    done = subprocess.run(make, capture_output=True, text=True, timeout=60, env=env, check=False)
    assert done.returncode != 0
    assert "Spark needs Java 17 or newer, but JAVA_HOME=/nowhere has no bin/java: install it" in done.stderr
    assert not (tmp_path / ".venv").exists()
