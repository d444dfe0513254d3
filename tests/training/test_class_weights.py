"""Class weights and balanced sampling in training: the same loss for any number of ranks and parts, equal priors."""

import math

import numpy as np
import pytest
import torch
from ranks import run_ranks
from small_shards import write_dataset

from pipeline.config import SettingsError, load_settings
from pipeline.config.model import ModelSettings
from pipeline.config.training import TrainSettings
from pipeline.data import load_manifest
from pipeline.distributed.worker import alone
from pipeline.training.assembly import assemble
from pipeline.training.class_weights import weights_of
from pipeline.training.job import Job, identity
from pipeline.training.loop import fit
from pipeline.training.step import MeanLoss

COUNTS = (400, 80, 40)
LABELS = np.random.default_rng(1).permutation(np.repeat([0, 1, 2], COUNTS))


@pytest.fixture(scope="module")
def noise(tmp_path_factory):
    """520 images of noise in three classes of 400, 80 and 40: all that can be learned are the classes' shares."""
    path = str(tmp_path_factory.mktemp("noise"))
    write_dataset(path, (300, 220), shape=(1, 12, 12), labels=LABELS)
    return path


def make_job(path, folder, **changes):
    train = {"epochs": 2, "batch_size": 40, "lanes": 4, "learning_rate": 0.1, "evaluate_on": "train", **changes}
    return Job(path, str(folder), ModelSettings(depth=3, width=4, norm="group", norm_groups=2), TrainSettings(**train))


def weights(path, **train):
    return weights_of(TrainSettings(batch_size=32, **train), load_manifest(path))


def test_balanced_weights_are_those_of_scikit_learn(noise):
    """``n_samples / (n_classes * np.bincount(y))``, as its documentation of `compute_class_weight` says."""
    found = weights(noise, class_weights="balanced")
    np.testing.assert_allclose(found, len(LABELS) / (3 * np.bincount(LABELS)))
    assert (found * COUNTS).sum() == pytest.approx(520)  # a mean of 1 over the split


def test_named_weights_are_scaled_to_a_mean_of_one_over_what_is_drawn(noise):
    found = weights(noise, class_weights={"b": 3, "2": 6})  # the third class by its number
    np.testing.assert_allclose(found / found[0], [1, 3, 6])
    assert (found * COUNTS).sum() == pytest.approx(520)
    balanced = weights(noise, class_weights={"b": 3, "2": 6}, sampling="balanced")
    np.testing.assert_allclose(balanced, np.array([1, 3, 6]) / (10 / 3))
    assert weights(noise) is None


def test_a_class_without_training_images_has_no_part_in_the_balance(noise):
    manifest = load_manifest(noise)
    split = manifest.split("train").model_copy(update={"label_counts": (480, 0, 40)})
    manifest = manifest.model_copy(update={"splits": {"train": split}})
    found = weights_of(TrainSettings(batch_size=32, class_weights="balanced"), manifest)
    np.testing.assert_allclose(found, [520 / 2 / 480, 1, 520 / 2 / 40])


def test_weights_of_no_class(noise):
    with pytest.raises(ValueError, match=r"names 'd', which is no class of dataset small: use names of a, b, c"):
        weights(noise, class_weights={"d": 1})
    with pytest.raises(ValueError, match="names '3', which is no class"):
        weights(noise, class_weights={3: 1})


def test_weights_that_leave_nothing_to_learn(noise):
    manifest = load_manifest(noise)
    split = manifest.split("train").model_copy(update={"label_counts": (480, 40, 0)})
    manifest = manifest.model_copy(update={"splits": {"train": split}})
    train = TrainSettings(batch_size=32, class_weights={"a": 0, "b": 0, "c": 1})
    with pytest.raises(ValueError, match="every class that has training images in dataset small weighs 0"):
        weights_of(train, manifest)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_mean_of_weighted_cross_entropies(smoothing):
    """As torch's weighted cross-entropy, but for what it is divided by; written out from its definition."""
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(24, 3, generator=random, dtype=torch.float64)
    labels, weight = torch.randint(0, 3, (24,), generator=random), torch.tensor([0.5, 2.0, 4.0], dtype=torch.float64)
    loss = MeanLoss(TrainSettings(batch_size=32, label_smoothing=smoothing), "cpu", weight)
    found = loss(logits, labels, lambda images: images)

    log_p = torch.log_softmax(logits, 1)
    of_label = -(1 - smoothing) * weight[labels] * log_p[torch.arange(24), labels]
    expected = (of_label - smoothing / 3 * (weight * log_p).sum(1)).mean()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    by_torch = torch.nn.functional.cross_entropy(logits, labels, weight, label_smoothing=smoothing)
    assert found.item() == pytest.approx(by_torch.item() * weight[labels].mean().item(), rel=1e-12)


def gradient_of(worker, job):
    """Loss and gradient of the first global batch."""
    with assemble(worker, job) as training:
        training.step.warm_up()
        with training.loader.batches(0) as batches:
            loss = training.step.gradients(next(batches), step=0).loss
        parameters = training.state.model.parameters()
        return loss, torch.cat([parameter.grad.flatten() for parameter in parameters]).numpy()


def gradients_of(worker, jobs):
    return [gradient_of(worker, job) for job in jobs]


WAYS = ({"class_weights": "balanced"}, {"sampling": "balanced"})


@pytest.mark.parametrize(("world_size", "accumulate"), [(1, 4), (2, 5), pytest.param(4, 1, marks=pytest.mark.slow)])
def test_loss_and_gradient_are_the_same_for_any_number_of_ranks_and_parts(noise, tmp_path, world_size, accumulate):
    alone_too = [*gradients_of(alone("cpu"), [make_job(noise, tmp_path / "one", **how) for how in (*WAYS, {})])]
    plain, other = alone_too.pop()
    for loss, gradient in alone_too:
        assert abs(loss - plain) > 1e-4
        assert np.abs(gradient - other).max() > 1e-3
    jobs = [make_job(noise, tmp_path / "many", accumulate=accumulate, **how) for how in WAYS]
    for of_rank in run_ranks(gradients_of, world_size, jobs):
        for (loss, gradient), (same_loss, same_gradient) in zip(alone_too, of_rank, strict=True):
            assert same_loss == pytest.approx(loss, rel=1e-6)
            np.testing.assert_allclose(same_gradient, gradient, atol=2e-6)


@pytest.mark.parametrize(
    ("how", "shares"),
    [
        ({}, np.array(COUNTS) / 520),
        ({"class_weights": "balanced"}, np.full(3, 1 / 3)),
        ({"sampling": "balanced"}, np.full(3, 1 / 3)),
    ],
)
def test_a_network_that_can_learn_shares_alone_learns_those_it_is_shown(noise, tmp_path, how, shares):
    job = make_job(noise, tmp_path, epochs=4, batch_size=20, learning_rate=0.02, **how)
    result = fit(alone("cpu"), job)
    with assemble(alone("cpu"), job) as training:
        training.checkpoints.restore()
        with training.loader.batches(0) as batches, torch.no_grad():
            logits = training.state.model.eval()(next(batches).images)
    predicted = torch.softmax(logits, 1).mean(0).numpy()
    np.testing.assert_allclose(predicted, shares, atol=0.12)
    entropy = -sum(share * math.log(share) for share in shares)
    assert result.train_loss[-1] == pytest.approx(entropy, abs=0.2)  # of the shares that are shown


def test_evaluation_is_not_weighted(noise, tmp_path):
    """Its loss is the plain cross-entropy over the split, at the state that training ended in."""
    job = make_job(noise, tmp_path, epochs=1, class_weights="balanced")
    result = fit(alone("cpu"), job)
    with assemble(alone("cpu"), job) as training:
        training.checkpoints.restore()
        assert training.evaluator.measure().loss == pytest.approx(result.curve[-1].loss, rel=1e-6)
        model = training.state.model.eval()
        with training.evaluator._split.batches() as batches:
            losses = [
                torch.nn.functional.cross_entropy(model(images), labels, reduction="sum").item()
                for images, labels, _ in batches
            ]
    assert sum(losses) / 520 == pytest.approx(result.curve[-1].loss, rel=1e-5)


def test_both_are_part_of_what_a_training_is(noise, tmp_path):
    jobs = [make_job(noise, tmp_path, **how) for how in ({}, {"class_weights": "balanced"}, {"sampling": "balanced"})]
    train = [identity(job)["train"] for job in jobs]
    assert train[0] != train[1] != train[2] != train[0]


def test_arms_of_a_comparison():
    settings = load_settings(
        "conf/quickstart.yaml", ["train.class_weights=[none, balanced]", "train.sampling=[shuffled]"]
    )
    assert settings.compare.grid["train.class_weights"] == ("none", "balanced")
    assert settings.with_values({"train.class_weights": "balanced"}).train.class_weights == "balanced"
    named = load_settings("conf/quickstart.yaml", ["train.class_weights={shirt: 2, 7: 0.5}"])
    assert named.train.class_weights == {"shirt": 2.0, "7": 0.5}
    assert named.with_values({"model.norm": "batch"}).train.class_weights == {"shirt": 2.0, "7": 0.5}


def test_weights_by_class_are_values_of_a_grid():
    """An arm has them as one text, which its name and MLflow can show and which means the same weights."""
    settings = load_settings("conf/quickstart.yaml", ["train.class_weights=[none, {shirt: 2, 7: 0.5}]"])
    assert settings.compare.grid["train.class_weights"] == ("none", "{'7': 0.5, shirt: 2}")
    arm = settings.with_values({"train.class_weights": "{'7': 0.5, shirt: 2}"})
    assert arm.train.class_weights == {"shirt": 2.0, "7": 0.5}
    alone = load_settings("conf/quickstart.yaml", ["train.class_weights={shirt: 2, 7: 0.5}"])
    assert arm.train == alone.train


def test_a_mapping_later_takes_the_place_of_a_grid_s_values():
    grid = "compare.grid={train.class_weights: [none, balanced]}"
    settings = load_settings("conf/quickstart.yaml", [grid, "train.class_weights={shirt: 2}"])
    assert "train.class_weights" not in settings.compare.grid
    assert settings.train.class_weights == {"shirt": 2.0}


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.class_weights=[1.0, 2.0]"], r"class_weights: 1\.0 is neither none, balanced, nor a mapping"),
        (["train.class_weights={shirt: -1}"], "weights of at least 0"),
        (["train.class_weights={shirt: .inf}"], "weights of at least 0"),
        (["train.class_weights={}"], "neither none"),
        (["train.class_weights=even"], "'even' is neither none"),
        (["train.class_weights=[none, {shirt: -2}]"], "'{shirt: -2}' is neither none"),
        (["train.class_weights=[none, {}]"], r"cannot vary train.class_weights over \{\}"),
        (["train.class_weights=[{shirt: 2}, {shirt: 2.0}]"], "train.class_weights lists a value twice"),
        (["train.class_weights=[none, [1, 2]]"], r"cannot vary train.class_weights over \[1, 2\]"),
        (["train.class_weights=balanced", "train.sampling=balanced"], "each balance the classes alone: set one"),
    ],
)
def test_weights_that_cannot_be_used(overrides, words):
    with pytest.raises(SettingsError, match=words):
        load_settings("conf/quickstart.yaml", overrides)
