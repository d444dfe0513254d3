"""A folder of photographs of many sizes and formats, some damaged, all the way through ingest and training."""

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from pipeline.__main__ import app

pytestmark = pytest.mark.spark


def save(part, path, kind, number):
    """One of the ways in which photographs come."""
    image = Image.fromarray(part)
    if kind == "png" and number % 3 == 0:
        image = image.convert("RGBA")
    if kind == "jpg" and number % 4 == 0:
        image = image.convert("L")
    if kind == "jpg" and number % 4 == 1:
        image = image.convert("CMYK")
    if kind == "png" and number % 3 == 1:
        image = image.quantize(64)
    image.save(path, {"jpg": "JPEG", "png": "PNG"}[kind])


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Parts of two photographs, 160 of each, and what was done to those that are damaged."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(3)
    damaged = {}
    for name, photo in zip(("temple", "flower"), load_sample_images().images, strict=True):
        (folder / name).mkdir()
        for number in range(160):
            height, width = random.integers(40, 300, 2)
            top, left = random.integers(0, 427 - height), random.integers(0, 640 - width)
            kind = ("jpg", "png")[number % 2]
            path = folder / name / f"{number:03d}.{kind}"
            save(photo[top : top + height, left : left + width], path, kind, number // 2)
            data = path.read_bytes()
            if number % 20 == 5:
                path.write_bytes(data[: len(data) // 2])
                damaged[str(path)] = "truncated"
            elif number % 20 == 10:
                path.write_bytes(b"")
                damaged[str(path)] = "empty"
            elif number % 20 == 16:
                path.write_bytes(b"<html>404 Not Found</html>")
                damaged[str(path)] = "undecodable"
    return folder, damaged


def test_a_folder_of_photographs_trains(spark, photos, tmp_path, capfd):
    folder, damaged = photos
    options = {
        "output": tmp_path / "runs",
        "dataset.path": tmp_path / "data",
        "dataset.source.path": folder,
        "dataset.image.shape": "[3,24,24]",
        "dataset.image.encoding": "jpeg",  # decoded by processes that the worker of Spark starts
        "dataset.image.decode": "scaled",
        "dataset.deduplicate": "false",
        "dataset.validation_share": 0.15,
        "dataset.test_share": 0.2,
        "dataset.max_bad_share": 0.2,
        "model.network": "cnn",
        "model.width": 8,
        "train.epochs": 6,
        "train.batch_size": 16,  # a twentieth of the epochs is warm-up, since the file says auto
        "train.lanes": 4,
        "train.evaluate_on": "test",
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "tracking.artifacts": tmp_path / "artifacts",
    }
    words = ["-c", "conf/folder.yaml", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    for command in ("ingest", "train"):
        app([command, *words], standalone_mode=False)
    said = capfd.readouterr().err
    assert "training images: warm-up over 0.3 epochs" in said
    assert re.search(r"accuracy \d+\.\d\d% \(the best of all evaluations was \d+\.\d\d%\) after \d+ steps", said)
    assert re.search(r"Dataset folder has 27\d images, \d+ of them in the test split", said)

    made = json.loads((tmp_path / "runs" / "ingest.json").read_text())
    assert sum(made["rows"].values()) + len(damaged) == 320
    aside = {row["origin"]: row["reason"] for row in pq.read_table(tmp_path / "data" / "quarantine").to_pylist()}
    assert aside == damaged
    assert json.loads((tmp_path / "runs" / "train.json").read_text())["best_accuracy"] > 0.7
