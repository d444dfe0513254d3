"""Whole trainings with random crops of another size than stored images, mixed labels, alternating flips and blocks
that are computed again: the same for any number of ranks, resumed, observed, evaluated."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from last_network import evaluated_directly, weights_after
from ranks import fit_until, run_ranks
from small_shards import write_dataset

from pipeline.config.augment import AugmentSettings
from pipeline.config.dataset import ReaderSettings
from pipeline.config.model import ModelSettings
from pipeline.config.training import CheckpointSettings, DiagnosticsSettings, TrainSettings
from pipeline.data import load_manifest
from pipeline.data.loader import TrainLoader, check_data
from pipeline.data.shards import SplitFiles
from pipeline.distributed.worker import alone
from pipeline.telemetry.events import EventReader
from pipeline.training.assembly import assemble
from pipeline.training.job import Job
from pipeline.training.loop import fit

AUGMENT = AugmentSettings(
    crop_scale=0.3, flip="alternating", brightness=0.2, contrast=0.2, saturation=0.2, cutout=2, mixup=0.2, cutmix=1.0
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """512 images in colour, of noise, whose only split is ``train``."""
    path = str(tmp_path_factory.mktemp("photographs") / "noise")
    write_dataset(path, (256, 256), shape=(3, 12, 12), row_group_rows=16)
    return path


def make_job(dataset, folder, model=None, **changes):
    settings = {"evaluate_on": "train", "evaluation_batch_size": 100,
                "epochs": 2, "batch_size": 32, "lanes": 4, "augment": AUGMENT, "label_smoothing": 0.1,
                "learning_rate": 0.02}  # fmt: skip
    model = {"network": "resnet", "depth": 8, "width": 4, "norm_groups": 2, "input_size": 8, "norm": "batch",
             "norm_statistics": "lane", **(model or {})}  # fmt: skip
    return Job(
        dataset,
        str(folder),
        ModelSettings(**model),
        TrainSettings(**{**settings, **changes}),
        checkpoint=CheckpointSettings(every_steps=5),
    )


def first_batches(worker, job):
    """Images and labels of two steps in the second epoch, as the network gets them, lane by lane."""
    with assemble(worker, job) as training:
        first = training.steps_per_epoch + 1
        parts = []
        with training.loader.batches(first) as batches:
            for step in (first, first + 1):
                ((images, labels),) = training.step.data.parts(next(batches), step)
                parts.append((images.contiguous().numpy(), labels.numpy()))
        blank, labels = training.step.data.blank()
        assert (blank.shape, labels.shape, labels.dtype) == (parts[0][0].shape, parts[0][1].shape, torch.float32)
        return parts


def test_every_rank_has_its_part_of_the_same_batch(dataset, tmp_path):
    job = make_job(dataset, tmp_path)
    whole = first_batches(alone("cpu"), job)
    assert whole[0][0].shape == (32, 3, 8, 8)
    assert whole[0][1].shape == (32, 3)
    ranks = run_ranks(first_batches, 2, job)
    for step in range(2):
        for rank in range(2):
            for values, expected in zip(ranks[rank][step], whole[step], strict=True):
                own = expected.reshape(4, 8, *expected.shape[1:])[rank::2]
                assert np.array_equal(values, own.reshape(values.shape))


def test_two_ranks_train_as_one_and_a_killed_training_goes_on_with_the_same_bits(dataset, tmp_path):
    one, two, cut = (make_job(dataset, tmp_path / name) for name in ("one", "two", "cut"))
    result = fit(alone("cpu"), one)
    assert result.steps == 32
    found = run_ranks(fit, 2, two)[0]
    for point, expected in zip(found.curve, result.curve, strict=True):
        assert point.loss == pytest.approx(expected.loss, rel=1e-3)
    assert fit_until(alone("cpu"), cut, 17) is None
    assert fit(alone("cpu"), cut).curve == result.curve
    assert all(torch.equal(weight, weights_after(one)[name]) for name, weight in weights_after(cut).items())


def test_ids_come_with_their_images(dataset):
    manifest = load_manifest(dataset)
    train = TrainSettings(epochs=1, batch_size=32, lanes=4, augment=AUGMENT, evaluate_on="train")
    files = SplitFiles(dataset, manifest, "train")
    of_images = {}
    for number, rows in enumerate(files.group_rows.tolist()):
        images = files.read(number, 0, rows)[0]
        of_images |= dict(zip(files.read_ids(number, 0, rows).tolist(), (i.tobytes() for i in images), strict=True))
    files.close()
    assert len(of_images) == manifest.split("train").rows
    for settings in (ReaderSettings(), ReaderSettings(memory_bytes=0)):
        for sampling in ("shuffled", "balanced"):
            train = train.model_copy(update={"sampling": sampling})
            loader = TrainLoader(dataset, manifest, train, settings, alone("cpu"))
            with loader.batches(0) as batches:
                for batch in batches:
                    for image, image_id in zip(batch.images, batch.ids.tolist(), strict=True):
                        assert image.numpy().tobytes() == of_images[image_id]
            loader.close()
    plain = TrainLoader(
        dataset,
        manifest,
        TrainSettings(epochs=1, batch_size=32, lanes=4, evaluate_on="train"),
        ReaderSettings(),
        alone("cpu"),
    )
    with plain.batches(0) as batches:
        assert next(batches).ids is None
    plain.close()


def test_evaluation_and_predictions_see_the_centre(dataset, tmp_path):
    """The kept network, built anew and given stored images, scores what the training says."""
    job = make_job(dataset, tmp_path, evaluation_statistics="precise", precise_batches=2)
    result = fit(alone("cpu"), job)
    assert evaluated_directly(job).loss.mean() == pytest.approx(result.curve[-1].loss, rel=1e-5)


@pytest.mark.parametrize(
    "how", [{"norm_statistics": "world"}, pytest.param({"norm": "power"}, marks=pytest.mark.slow)], ids=str
)
def test_blocks_that_are_computed_again_change_no_training(how, dataset, tmp_path):
    """On two ranks, whose sums within a block, and averages of gradients, come in the same order on both."""
    plain, again = (
        make_job(dataset, tmp_path / str(on), model={**how, "norm_warmup_steps": 4}, epochs=1, accumulate=2,
                 gradient_checkpointing=on)
        for on in (False, True)
    )  # fmt: skip
    results = [run_ranks(fit, 2, job)[0] for job in (plain, again)]
    assert results[0].curve == results[1].curve
    weights = [weights_after(job) for job in (plain, again)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())


def test_observations_are_those_of_blocks_computed_once(dataset, tmp_path):
    seen = []
    for on in (False, True):
        diagnostics = DiagnosticsSettings(every_steps=10, smoothness=True)
        job = make_job(dataset, tmp_path / str(on), epochs=1, diagnostics=diagnostics, gradient_checkpointing=on)
        fit(alone("cpu"), job)
        events = [event for event in EventReader(f"{job.folder}/events").new() if event["kind"] == "diagnostics"]
        seen.append([event["values"] for event in events])
    assert seen[0] == seen[1]
    assert any(name.startswith("activation_variance") for name in seen[0][0])


def test_what_does_not_go_together_is_said_before_the_start(dataset, tmp_path):
    manifest = load_manifest(dataset)
    for changes, reader, message in (
        ({"batch_size": 4}, "arrow", r"train\.augment\.mixup mixes images of one lane"),
        ({"augment": AugmentSettings(flip="alternating")}, "petastorm", r"flip alternating needs reader\.kind arrow"),
    ):
        with pytest.raises(ValueError, match=message):
            check_data(manifest, make_job(dataset, tmp_path, **changes).train, ReaderSettings(kind=reader), 1)
    for name in ("compile", "cuda_graphs"):
        with pytest.raises(ValueError, match=f"gradient_checkpointing and {name}"):
            TrainSettings(gradient_checkpointing=True, **{name: True})
    job = make_job(dataset, tmp_path, model={"input_size": 16})
    with pytest.raises(ValueError, match="is larger than stored images, 12 x 12"):
        fit(alone("cpu"), replace(job))
