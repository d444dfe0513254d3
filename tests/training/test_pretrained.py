"""Fine-tuning on ranks: from a checkpoint of sparknorm, with frozen parts, the same bits after a restart."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import fit_until, run_ranks
from small_halves import write_halves
from small_training import equal, final_state, make_job

from pipeline import storage
from pipeline.config.model import ModelSettings
from pipeline.config.settings import Settings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest
from pipeline.driver import checks, trial
from pipeline.training.job import facts, identity
from pipeline.training.network import network_for
from pipeline.training.pretrained import check_pretrained
from pipeline.training.weights_file import WeightsError


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    return write_halves(tmp_path_factory.mktemp("halves") / "three")


@pytest.fixture(scope="module")
def trained(halves, tmp_path_factory):
    """A job that has trained on three classes, and its last checkpoint."""
    job = make_job(halves, tmp_path_factory.mktemp("trained"), epochs=4)
    return job, run_ranks(fit_until, 1, job, None)[0].checkpoint


def tuned(dataset, folder, weights, **model):
    """A job that begins with those weights. Of the plain CNN the layers are ``features.0`` and so on."""
    job = make_job(dataset, folder, epochs=1, learning_rate=0.05)
    return replace(job, model=job.model.model_copy(update={"weights": weights, **model}))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_frozen_trunk_ends_as_it_began_and_the_head_learns(halves, trained, tmp_path, world_size):
    job = tuned(halves, tmp_path, trained[1], freeze=("features",))
    result = run_ranks(fit_until, world_size, job, None)[0]
    before, after = (final_state(each)["model"] for each in (trained[0], job))
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved == {"1.classifier.weight", "1.classifier.bias"}
    assert result.notes == ()


@pytest.mark.slow
def test_a_killed_fine_tuning_ends_with_the_same_bits(halves, trained, tmp_path):
    jobs = [tuned(halves, tmp_path / name, trained[1], freeze=("features.0", "features.1")) for name in ("one", "two")]
    run_ranks(fit_until, 2, jobs[0], None)
    run_ranks(fit_until, 2, jobs[1], 5)
    run_ranks(fit_until, 2, jobs[1], None)
    assert equal(*map(final_state, jobs))


def test_other_classes_get_a_new_head_which_the_result_says(trained, tmp_path):
    dataset = write_halves(tmp_path / "five", classes=5)
    result = run_ranks(fit_until, 1, tuned(dataset, tmp_path / "job", trained[1], norm="group", norm_groups=2), None)[0]
    assert result.notes == (
        f"model.weights {trained[1]}: the head classifier is new: 5 classes here, 3 in the file",
        f"model.weights {trained[1]}: running statistics of 3 layers are left out: group keeps none",
    )
    assert result.curve[-1].accuracy > 0.5


def test_a_changed_file_is_another_training_and_a_moved_one_is_not(halves, trained, tmp_path):
    paths = [f"{tmp_path}/{name}.pt" for name in "ab"]
    for path in paths:
        storage.publish(path, Path(trained[1]).read_bytes())
    one, two = (tuned(halves, tmp_path, path) for path in paths)
    assert identity(one) == identity(two) != identity(tuned(halves, tmp_path, None))
    before = identity(one)
    state = torch.load(paths[0], weights_only=True)
    state["model"]["1.classifier.bias"] += 1
    torch.save(state, paths[0])
    assert identity(one)["the content of model.weights"] != before["the content of model.weights"]
    given = replace(one, weights_digest=before["the content of model.weights"])
    assert identity(given) == before
    with pytest.raises(WeightsError, match="reads another file than the driver did"):
        fit_until(run_worker(), given, None)


def run_worker():
    from pipeline.distributed.worker import alone

    return alone("cpu")


def settings_of(dataset, folder, model, **train):
    return Settings.model_validate(
        {"name": "small", "output": str(folder), "dataset": {"path": dataset},
         "model": {"depth": 3, "width": 4, **model}, "train": {"batch_size": 32, "lanes": 4, **train}}
    )  # fmt: skip


def test_the_driver_finds_what_is_wrong_before_anything_is_launched(halves, trained, tmp_path):
    manifest = load_manifest(halves, None)
    wrong = {
        "there is no such file": {"weights": f"{tmp_path}/none"},
        "does not fit the network": {"weights": trained[1], "width": 8},
        "model.freeze: the network has no 'layer1'": {"weights": trained[1], "freeze": ["layer1"]},
        "model.weights_sha256 is dddd": {"weights": trained[1], "weights_sha256": "d" * 64},
        "model.mean [0.1, 0.2] has 2 numbers, and the images of the dataset have 1 channels": {"mean": [0.1, 0.2]},
    }
    for message, model in wrong.items():
        with pytest.raises(ValueError) as raised:
            checks.check_network(settings_of(halves, tmp_path, model), manifest)
        assert message in str(raised.value)
    good = settings_of(halves, tmp_path, {"weights": trained[1], "norm": "group", "norm_groups": 2})
    assert checks.check_network(good, manifest) > 0
    assert checks.network_notes(good, manifest) == [
        f"model.weights {trained[1]}: running statistics of 3 layers are left out: group keeps none"
    ]


def test_the_driver_tells_ranks_which_file_it_has_read(halves, trained, tmp_path, monkeypatch):
    """A relative path means the same on every machine, and the digest travels."""
    monkeypatch.chdir(Path(trained[1]).parent)
    settings = settings_of(halves, tmp_path, {"weights": Path(trained[1]).name})
    begun = trial._begin(settings, load_manifest(halves, None), "small", None)
    assert begun.job.model.weights == trained[1]
    assert begun.identity["the content of model.weights"] == begun.job.weights_digest != ""
    assert "weights" not in begun.identity["model"]
    gone = replace(begun.job, model=begun.job.model.model_copy(update={"weights": f"{tmp_path}/none"}), token="")
    with pytest.raises(WeightsError, match=r"there is no such file, as .* sees it"):
        facts(replace(gone, folder=str(tmp_path)))


def test_a_head_that_is_asked_for_must_be_known_and_learn(halves):
    manifest = load_manifest(halves, None)
    own = ModelSettings(network="fine_tuned_net:without_norm")
    for train, name in ((TrainSettings(head_learning_rate=1), "head_learning_rate"), (TrainSettings(clip_adaptive=1),
                                                                                      "clip_adaptive")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"train\.{name} asks which layer is the head, and the last layer"):
            check_pretrained(own, train, manifest)
        known = check_pretrained(ModelSettings(depth=3, width=4), train, manifest)
        assert known.head == {"1.classifier.weight", "1.classifier.bias"}
    with pytest.raises(ValueError, match=r"is for the head, classifier, which model\.freeze freezes: set it to null"):
        check_pretrained(
            ModelSettings(depth=3, width=4, freeze=["classifier"]), TrainSettings(head_learning_rate=1), manifest
        )
    assert check_pretrained(ModelSettings(), TrainSettings(), manifest).head == frozenset()


def test_mean_and_std_may_be_those_of_the_weights(halves, tmp_path):
    three = write_halves(tmp_path / "colour", channels=3, rows=60)
    manifest = load_manifest(three, None)
    image = torch.full((1, 3, 2, 2), 255, dtype=torch.uint8)
    of_split = network_for(ModelSettings(), manifest)[0](image)
    imagenet = network_for(ModelSettings(mean="imagenet", std="imagenet"), manifest)[0](image)
    numbers = network_for(ModelSettings(mean=[0.5, 0.4, 0.0], std=[0.25, 0.3, 1.0]), manifest)[0](image)
    torch.testing.assert_close(imagenet[0, :, 0, 0], torch.tensor([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225]))
    torch.testing.assert_close(numbers[0, :, 0, 0], torch.tensor([2.0, 2.0, 1.0]))
    split = manifest.split("train")
    torch.testing.assert_close(of_split[0, 0, 0, 0].item(), (1 - split.mean[0]) / split.std[0], rtol=1e-4, atol=1e-4)


def test_lists_of_settings_are_values_and_not_arms(tmp_path):
    from pipeline.config import load_settings

    file = tmp_path / "x.yaml"
    file.write_text(
        "name: x\nmodel: {freeze: [conv1, layer1], mean: [0.1, 0.2, 0.3], std: imagenet, norm: [batch, none]}\n"
    )
    settings = load_settings(file)
    assert settings.model.freeze == ("conv1", "layer1")
    assert settings.model.mean == (0.1, 0.2, 0.3)
    assert list(settings.compare.grid) == ["model.norm"]
    file.write_text("name: x\ncompare: {grid: {model.freeze: [none, 'conv1, layer1'], model.weights: [null, a.pt]}}\n")
    arm = load_settings(file).with_values({"model.freeze": "conv1, layer1", "model.weights": "a.pt"})
    assert (arm.model.freeze, arm.model.weights) == (("conv1", "layer1"), "a.pt")
    with pytest.raises(ValueError, match="a name is empty"):
        load_settings(file, ["model.freeze=[conv1, '']"])
    with pytest.raises(ValueError, match="must be above 0"):
        load_settings(file, ["model.std=[0.2, 0]"])


def test_norms_are_swapped_in_a_network_whose_parameters_hang_on_the_size_that_it_sees(halves, tmp_path):
    """Of images of 12 pixels it sees 8: so many positions has its own network, and that with the norms of the file."""
    manifest = load_manifest(halves)
    model = ModelSettings(network="vit", depth=2, width=8, heads=2, patch=4, norm="batch", input_size=8)
    torch.save(network_for(model, manifest)[1].state_dict(), tmp_path / "batch.pt")
    tuned = model.model_copy(update={"norm": "layer", "weights": str(tmp_path / "batch.pt")})
    assert any("layer in the place of batch norm" in note or "left out" in note for note in
               check_pretrained(tuned, TrainSettings(), manifest).notes)  # fmt: skip
