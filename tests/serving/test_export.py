"""What a training leaves becomes files that give the same logits without this package."""

import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_data import CLASSES, make_images
from small_networks import SMALL
from small_training import make_job

from models import build_model
from models.fold import FoldError
from models.norms.base import NormLayer
from pipeline.__main__ import app
from pipeline.config.model import ModelSettings
from pipeline.config.settings import Settings
from pipeline.config.study import ExportSettings
from pipeline.driver import train
from pipeline.driver.record import Record
from pipeline.driver.trial import BegunTrial
from pipeline.report.comparison import TrialResult
from pipeline.serving import ExportError, checked, export, export_folder, formats, trained
from pipeline.serving.exporting import fold_norms
from pipeline.serving.result import ONNX_PACKAGES
from pipeline.serving.trained import find_trained

HAS_ONNX = all(importlib.util.find_spec(name) for name in ONNX_PACKAGES)
FORMATS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "onnx" and not HAS_ONNX, reason="needs pip install 'sparknorm[onnx]'")
    )
    for name in formats.FORMATS
]
DEPTHS = {"cnn": 3, "recurrent": 1, "resnet": 8, "vit": 1, "wide_resnet": 10}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("network", SMALL)
def test_every_network_is_written_and_read_back_for_any_batch_size(network, kind):
    depth = {"depth": DEPTHS[network]} if network in DEPTHS else {}
    settings = ModelSettings(network=network, norm="batch", width=4, **depth)
    model = build_model(settings, image_shape=(3, 8, 8), num_classes=5).eval().requires_grad_(False)
    form = formats.FORMATS[kind]
    run = form.load(form.write(model, torch.zeros(2, 3, 8, 8, dtype=torch.uint8)))
    for rows in (1, 2, 5):
        images = torch.randint(0, 256, (rows, 3, 8, 8), dtype=torch.uint8)
        with torch.inference_mode():
            logits = run(images)
            assert (logits.shape, logits.dtype) == ((rows, 5), torch.float32)
            torch.testing.assert_close(logits, model(images), rtol=1e-5, atol=1e-5)


def changed(settings: Settings, **sections) -> Settings:
    """The settings with some fields of some sections replaced."""
    tree = settings.model_dump()
    return Settings.model_validate({**tree, **{name: {**tree[name], **new} for name, new in sections.items()}})


# Loads what was exported and nothing of ours, and says what it gives.
STRANGER = """
import sys, io
for name in ("models", "pipeline"):
    sys.modules[name] = None  # any import of it raises
import numpy as np, torch
folder, images = sys.argv[1], torch.from_numpy(np.load(sys.argv[2]))
with torch.inference_mode():
    pt2 = torch.export.load(f"{folder}/model.pt2").module()(images)
    script = torch.jit.load(f"{folder}/model.ts")(images)
np.savez(sys.argv[3], pt2=pt2.numpy(), script=script.numpy())
"""


def run_command(settings, *overrides, capsys) -> tuple[str, str]:
    """(standard output, standard error) of `sparknorm export` with these settings."""
    path = Path(settings.output).parent / "settings.yaml"
    path.write_text(json.dumps(settings.model_dump(mode="json")))  # JSON is YAML
    words = [word for override in overrides for word in ("-o", override)]
    app(["export", "-c", str(path), *words], standalone_mode=False)
    said = capsys.readouterr()
    return said.out, said.err


@pytest.mark.spark
def test_a_trained_network_is_exported(spark, settings, tmp_path, capsys):
    """One training, then the command as a person gives it, and again with other settings of the export."""
    with pytest.raises(
        ExportError, match="no finished training 'small batch seed=0' with these settings and this data"
    ):
        export(settings)
    train(spark, settings)
    newest = train(spark, settings)
    assert json.loads(Path(settings.output, "train.json").read_text()) == newest.model_dump(
        mode="json", exclude_unset=True
    )
    capsys.readouterr()

    out, err = run_command(settings, capsys=capsys)
    path = Path(settings.output, "export", "small-batch-seed=0", "export.json")
    assert export_folder(settings) == str(path.parent)
    assert out == f"{path}\n"
    made = json.loads(path.read_text())
    kinds = [kind for kind in formats.FORMATS if kind != "onnx" or HAS_ONNX]
    assert sorted(made["files"]) == sorted(formats.FORMATS[kind].file for kind in kinds)
    assert sorted(p.name for p in path.parent.iterdir()) == sorted([*made["files"], "export.json"])
    assert made["classes"] == list(CLASSES)
    assert made["input"] == {"name": "images", "dtype": "uint8", "shape": ["batch", 1, 12, 12]}
    assert made["compared_on"] == {"split": "test", "images": 301}
    assert (made["checkpoint"], made["mlflow_run"]) == (newest.checkpoint, newest.run_id)
    assert made["accuracy"] == pytest.approx(newest.final_accuracy)  # 301 are the whole test split
    network = find_trained(settings).network
    norms = [name for name, module in network.named_modules() if isinstance(module, NormLayer)]
    assert len(norms) == 3
    assert made["fold"] == {"folded": norms, "left": {}}
    for file, facts in made["files"].items():
        assert hashlib.sha256((path.parent / file).read_bytes()).hexdigest() == facts["sha256"]
        assert facts["largest_difference"] <= 1e-4
        assert facts["accuracy"] == made["accuracy"]
        assert facts["bytes"] == (path.parent / file).stat().st_size
        assert f"{file}: on 301 images of test, logits differ by at most " in err
    assert "3 of 3 norm layers folded" in err

    images = torch.from_numpy(make_images(40, 9)[0][:, None])
    np.save(tmp_path / "images.npy", images.numpy())
    stranger = [sys.executable, "-c", STRANGER, str(path.parent), str(tmp_path / "images.npy"), str(tmp_path / "y.npz")]
    done = subprocess.run(stranger, capture_output=True, text=True, timeout=120, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    for logits in np.load(tmp_path / "y.npz").values():
        np.testing.assert_allclose(logits, network(images).numpy(), atol=1e-4)

    run_command(settings, "export.fold=false", "export.formats=[torchscript]", capsys=capsys)
    made = json.loads(path.read_text())
    assert made["fold"] == {"folded": [], "left": {}}
    assert sorted(p.name for p in path.parent.iterdir()) == ["export.json", "model.ts"]

    # Other settings of the training are another training. An export that is refused leaves the earlier one whole.
    files = {each.name: each.read_bytes() for each in path.parent.iterdir()}
    with pytest.raises(ExportError, match="run `sparknorm train` with the same settings first"):
        export(changed(settings, train={"learning_rate": 0.3}))
    assert {each.name: each.read_bytes() for each in path.parent.iterdir()} == files


@pytest.mark.spark
def test_norms_that_cannot_be_folded(spark, settings, capsys):
    settings = changed(settings, model={"norm": "group"}, train={"epochs": 1})
    train(spark, settings)
    with pytest.raises(FoldError, match=r"^3 of 3 norm layers cannot be folded: GroupNorm has no running statistics"):
        export(changed(settings, export={"fold": True}))
    assert not Path(settings.output, "export", "small-group-seed=0").exists()
    capsys.readouterr()
    out, err = run_command(settings, "export.formats=[torchscript]", capsys=capsys)
    assert "0 of 3 norm layers folded" in err
    assert "not folded: GroupNorm has no running statistics (1.features.1, " in err
    assert list(json.loads(Path(out.strip()).read_text())["fold"]["left"]) != []


@pytest.mark.spark
@pytest.mark.parametrize(
    ("diverged", "words"),
    [
        (True, "diverged: train with other settings first"),
        (False, "has no whole checkpoint of the last step, 3: train again"),
    ],
)
def test_a_training_that_cannot_be_exported(settings, tmp_path, monkeypatch, diverged, words):
    record = Record(str(tmp_path))
    record.update(result=result_of(diverged=diverged, steps=3))
    job = make_job(settings.dataset.path, tmp_path)
    monkeypatch.setattr(trained, "newest_finished", lambda *_: BegunTrial(record, job, {}))
    with pytest.raises(ExportError, match=words):
        find_trained(settings)


def result_of(**values):
    """A result as a finished training leaves it in its record."""
    numbers = {"best_accuracy": 0.5, "final_accuracy": 0.5, "final_balanced_accuracy": 0.5, "final_macro_f1": 0.5,
               "final_loss": None, "final_calibration_error": None, "images_per_second": None,
               "data_wait_share": None}  # fmt: skip
    rest = {
        "world_size": 1,
        "attempts": 1,
        "curve": (),
        "train_loss": (),
        "train_seconds": (),
        "ranks": (),
        "recall": (),
    }
    return TrialResult(**numbers, **rest, checkpoint="", run_id="1", **values)


def test_onnx_without_its_packages_is_an_error_only_if_it_is_asked_for(monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'sparknorm\[onnx\]'"):
        formats.chosen_formats(ExportSettings(formats=("onnx",)))
    assert formats.chosen_formats(ExportSettings()) == ["pt2", "torchscript"]


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("error", [2e-4, float("nan")])
def test_a_file_that_gives_other_logits_is_refused(error, size):
    """The error is a share of the largest logit."""
    logits = size * torch.linspace(-1, 0.5, 12, dtype=torch.float64).view(4, 3)
    words = f"differ by {error * size:.2g} from the trained network's, the largest of which is {size:.2g}; rounding"
    with pytest.raises(ExportError, match=re.escape(f"model.ts gives logits that {words} explains at most 0.0001 of")):
        checked.largest_difference("model.ts", logits + error * size, logits)
    assert checked.largest_difference("model.ts", logits - 5e-5 * size, logits) == pytest.approx(5e-5 * size)


def test_a_network_that_gives_nothing_but_zeros_is_exported_only_as_such():
    logits = torch.zeros(4, 3)
    assert checked.largest_difference("model.ts", logits.clone(), logits) == 0
    with pytest.raises(ExportError, match=r"differ by 1e-08 .*, the largest of which is 0; "):
        checked.largest_difference("model.ts", logits + 1e-8, logits)


def test_folding_is_part_of_what_is_exported():
    settings = ModelSettings(network="resnet", depth=8, width=4)
    network = build_model(settings, image_shape=(1, 12, 12), num_classes=3).eval()
    for choice, left in ((True, 0), ("auto", 0), (False, 9)):
        folded = fold_norms(network, ExportSettings(fold=choice)).model
        assert sum(isinstance(module, NormLayer) for module in folded.modules()) == left
