"""The real studies of `make bench PART=verdicts`: their definitions, their datasets, and that they need no Spark."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import verdict_data
from verdict_data import FRESH, SEEN, STUDIES, Data, counts_of, spoil, unseen, write

from pipeline.data import load_manifest

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def images(tmp_path, monkeypatch):
    """A file of made-up images as `pack` writes it: of class n all pixels are 20 n, and some noise."""
    random, arrays = np.random.default_rng(0), {}
    for part, rows in (("train", 12_000), ("t10k", 1_000), ("digits", 1_800)):
        labels = np.arange(rows, dtype=np.int64) % 10
        pixels = 20 * labels[:, None, None, None] + random.integers(0, 20, (rows, 1, 14, 14))
        arrays |= {f"{part}_pixels": pixels.astype(np.uint8), f"{part}_labels": labels}
    np.savez(tmp_path / "images.npz", **arrays)
    monkeypatch.setenv("BENCH_IMAGES", str(tmp_path / "images.npz"))
    verdict_data.images.cache_clear()
    yield tmp_path / "images.npz"
    verdict_data.images.cache_clear()


def test_studies_have_names_and_fresh_ones_seeds_that_none_had():
    assert len({data.file for data in STUDIES}) == len(STUDIES) == 32
    fresh = [data.seed for data in STUDIES if data.group == FRESH]
    assert len(set(fresh)) == 16
    assert min(fresh) > max(data.seed for data in STUDIES if data.group != FRESH)
    assert all("fresh" in data.name for data in STUDIES if data.group == FRESH)
    assert sum(data.group == SEEN for data in STUDIES) == 8


def test_the_largest_class_is_the_one_that_is_said():
    tail = counts_of(Data("x", tail=10, largest=6), 1000, 10)
    assert tail.argmax() == 6
    assert tail[6] / tail[5] == pytest.approx(10, rel=0.1)
    major = counts_of(Data("x", major=0.75, largest=8), 2000, 10)
    assert major[8] == 1500


def test_a_share_of_the_labels_that_are_learned_from_is_wrong_and_none_that_judges(images, tmp_path):
    write(Data("x", noise=0.4, nuisance="patch", rows=1000), str(tmp_path / "data"))
    manifest = load_manifest(str(tmp_path / "data"))
    assert {name: split.rows for name, split in manifest.splits.items()} == {
        "train": 1000, "validation": 250, "test": 500,
    }  # fmt: skip
    assert manifest.split("test").label_counts == tuple([50] * 10)
    assert manifest.split("train").label_counts != tuple([100] * 10)


@pytest.mark.parametrize("nuisance", ["none", "blur", "patch", "speckle", "dim"])
def test_unseen_images_have_the_trouble_of_the_study(images, nuisance):
    pixels, labels = unseen(Data("x", nuisance=nuisance, seed=3))
    clean, _ = verdict_data.images("t10k")
    assert (pixels.shape, pixels.dtype) == (clean.shape, clean.dtype)
    assert np.array_equal(pixels, clean) == (nuisance == "none")
    assert np.array_equal(pixels, unseen(Data("x", nuisance=nuisance, seed=3))[0])
    assert len(labels) == 1000
    black = (spoil(np.full((5, 1, 14, 14), 200, np.uint8), nuisance, np.random.default_rng(0)) == 0).sum((1, 2, 3))
    assert (black == 25).all() if nuisance == "patch" else not black.any()


PROGRAM = """
import sys
sys.path.insert(0, {bench!r})
import verdicts
from verdict_data import Data

verdicts.ARMS, verdicts.RATES, verdicts.TRUTH_SEEDS = ("none", "batch"), (0.05, 0.2), (100,)
verdicts.STUDIES = [Data("tiny", rows=120, noise=0.2, nuisance="blur", group="fresh")]
if __name__ == "__main__":
    task = verdicts.STUDIES[0]
    verdicts._prepare(task)
    verdicts._decide(task)
    for arm in verdicts.ARMS:
        for rate in {{*verdicts.RATES, *(r for a, r in verdicts._beyond(task) if a == arm)}}:
            verdicts._truth(task, arm, rate)
    verdicts._finish(task)
    print({{"pyspark", "mlflow", "py4j", "sklearn"}} & set(sys.modules))
"""


@pytest.mark.slow
def test_a_study_needs_no_spark_and_says_what_its_choice_loses(images, tmp_path):
    """All tasks of one study in one process, which imports neither Spark nor MLflow nor scikit-learn."""
    program = PROGRAM.format(bench=str(BENCH))
    environment = {**os.environ, "BENCH_VERDICTS": str(tmp_path / "verdicts"), "OMP_NUM_THREADS": "1",
                   "PYTHONPATH": str(BENCH.parents[1])}  # fmt: skip
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.splitlines()[-1] == "set()"
    result = json.loads((tmp_path / "verdicts" / "tiny.json").read_text())
    assert [arm["arm"] for arm in result["arms"]] == ["none", "batch"]
    for arm in result["arms"]:
        truth = {key: np.mean(scores) for key, scores in result["truth"].items() if key.startswith(arm["arm"])}
        best = max(truth[f"{arm['arm']} {rate}"] for rate in (0.05, 0.2))
        assert arm["lost"] == pytest.approx(best - truth[f"{arm['arm']} {arm['chosen']}"])
        assert arm["within"] == (arm["lost"] <= 0.01)
        assert arm["seeds"] in (1, 2, 3)
    assert not list((tmp_path / "verdicts").glob("*/"))
