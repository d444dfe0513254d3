"""The recipe for photographs, conf/imagenet.yaml, on folders of real ones: from ingest to a report, with few epochs."""

import json
import math

import pytest
from debian import need_files
from photographs import BACKGROUNDS, PACKAGE, write_folder

from pipeline.__main__ import app
from pipeline.config import load_settings
from pipeline.data import load_manifest
from pipeline.training.network import network_for

pytestmark = pytest.mark.spark


def run(folder, tmp_path, commands, **changes):
    """Commands one after the other, with the recipe's settings but for these; returns the options."""
    options = {
        "output": tmp_path / "runs",
        "dataset.path": tmp_path / "data",
        "dataset.source.path": folder,
        "train.bf16": "false",  # few CPUs compute with it
        "train.lanes": 4,
        "train.warmup_epochs": 0.5,
        "train.base_batch_size": "null",
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "tracking.artifacts": tmp_path / "artifacts",
        "tracking.system_metrics": "false",
        **changes,
    }
    words = ["-c", "conf/imagenet.yaml", *(word for key, value in options.items() for word in ("-o", f"{key}={value}"))]
    for command in commands:
        app([command, *words], standalone_mode=False)
    return load_settings("conf/imagenet.yaml", [f"{key}={value}" for key, value in options.items()])


def test_a_folder_of_photographs_becomes_an_exported_network(spark, tmp_path):
    """In small: stored at 72 pixels, trained at 64, its centre cut out of stored images by what is served."""
    files = write_folder(tmp_path / "photos", of_package=False, train=36, validation=18)
    settings = run(
        tmp_path / "photos",
        tmp_path,
        ("ingest", "train", "export"),
        **{
            "dataset.image.shape": "[3,72,72]",
            "model.network": "cnn",
            "model.width": 8,
            "model.norm": "batch",
            "model.input_size": 64,
            "train.epochs": 15,
            "train.rank_batch_size": 8,  # of two workers
            "train.evaluation_statistics": "precise",  # running ones take more steps than this has
            "train.augment.flip": "alternating",
            "train.augment.saturation": 0.2,
            "train.augment.cutmix": 1,
            "train.gradient_checkpointing": "true",
            "export.formats": "[pt2]",
        },
    )
    manifest = load_manifest(str(tmp_path / "data"))
    assert manifest.image.shape == (3, 72, 72)
    assert not manifest.set_aside
    assert {name: split.rows for name, split in manifest.splits.items()} == {"train": 72, "validation": 36}
    assert sum(split.rows for split in manifest.splits.values()) == files
    network = network_for(settings.model, manifest)
    assert network[0].crop.size == 64
    made = json.loads((tmp_path / "runs" / "train.json").read_text())
    assert made["best_accuracy"] > 0.7  # of two classes
    exported = json.loads(next((tmp_path / "runs" / "export").glob("*/export.json")).read_text())
    assert exported["input"]["shape"] == ["batch", 3, 72, 72]
    assert exported["accuracy"] == pytest.approx(made["final_accuracy"], abs=1e-6)


@pytest.mark.slow
def test_photographs_of_a_distribution_go_from_ingest_to_a_report_at_224_pixels(spark, tmp_path):
    """8 photographs as classes, 416 files, ResNet-18 with two norms and without, 6 epochs: 10 minutes."""
    need_files(BACKGROUNDS, package=PACKAGE)
    write_folder(tmp_path / "photos", of_package=True, train=40, validation=12)
    run(
        tmp_path / "photos",
        tmp_path,
        ("ingest", "compare"),
        **{
            "model.network": "resnet18",
            "compare.grid.model.norm": "[batch,none,group]",
            "compare.grid.train.learning_rate": "[0.01]",
            "train.epochs": 6,
            "train.rank_batch_size": 16,
            "train.evaluation_statistics": "precise",
            "train.precise_batches": 4,
        },
    )
    manifest = load_manifest(str(tmp_path / "data"))
    assert manifest.image.shape == (3, 256, 256)
    assert (manifest.split("train").rows, manifest.split("validation").rows) == (320, 96)
    assert not manifest.set_aside
    found = json.loads((tmp_path / "runs" / "comparison.json").read_text())
    accuracies = {run["arm"]: run["final_accuracy"] for run in found["runs"]}
    assert list(accuracies) == ["batch", "none", "group"]
    assert min(accuracies["batch"], accuracies["group"]) > 0.4  # of 8 classes
    assert (tmp_path / "runs" / "report.html").stat().st_size > 50_000


@pytest.mark.slow
def test_resnet50_trains_by_the_recipe_at_224_pixels(spark, tmp_path):
    """One epoch of two classes, with all that the recipe has but its batch of 256: 3 minutes."""
    write_folder(tmp_path / "photos", of_package=False, train=32, validation=8)
    run(
        tmp_path / "photos",
        tmp_path,
        ("ingest", "train"),
        **{"model.norm": "batch", "train.epochs": 1, "train.rank_batch_size": 16, "train.learning_rate": 0.02,
           "train.gradient_checkpointing": "true"},
    )  # fmt: skip
    made = json.loads((tmp_path / "runs" / "train.json").read_text())
    assert made["steps"] == 2  # of two workers
    assert math.isfinite(made["final_loss"])
