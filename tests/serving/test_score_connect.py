"""Scores over Spark Connect: the model reaches executors as a file of the session."""

import json
import subprocess
import sys

import numpy as np
import pytest
import yaml
from connect_server import REPOSITORY, code_zip, connect_server, plain_environment
from small_models import photo, write_model
from small_scores import probabilities_of, rows_of, score_settings, write_photos

from pipeline.serving import Predictor

pytestmark = [pytest.mark.spark, pytest.mark.slow]


def test_the_same_scores_over_connect(tmp_path):
    model, _ = write_model(tmp_path)
    photos = write_photos(tmp_path / "in", 20)
    settings = score_settings(
        tmp_path / "out", model, tmp_path / "mlflow.db", source={"kind": "folder", "path": str(photos)}
    )
    tree = settings.model_dump(mode="json")
    code = code_zip(tmp_path / "sparknorm.zip")
    with connect_server(tmp_path) as address:
        tree["spark"] = {"master": address, "py_files": [str(code)]}
        (tmp_path / "settings.yaml").write_text(yaml.safe_dump(tree))
        done = subprocess.run(
            [sys.executable, "-m", "pipeline", "score", "-c", str(tmp_path / "settings.yaml")],
            # A JAVA_HOME that is none: a client that started a JVM would fail.
            env={**plain_environment(), "PYTHONPATH": str(REPOSITORY), "JAVA_HOME": "/nowhere"},
            cwd=tmp_path, capture_output=True, text=True, timeout=280, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "out" / "score.json").read_text())
    predictor = Predictor.load(model)
    rows = rows_of(result["scores"])
    images = [predictor.decode(photo_of(row)) for row in rows]
    np.testing.assert_allclose(probabilities_of(rows), predictor.probabilities(np.stack(images)), rtol=0, atol=1e-6)
    assert len(rows) == 20


def photo_of(row):
    number = int(row["origin"].rpartition("/")[2].split(".")[0])
    kind = ("JPEG", "PNG")[number % 2]
    return photo(14 + number % 7, 12 + number % 5, kind=kind, seed=number)
